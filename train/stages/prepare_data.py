"""`mixfuse data prepare`, and the same at the start of a run: the data of a recipe, tokenised in the cache."""

from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import check_output, keep_apart
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data.chat_data import CHATS
from mixfuse.train.data.pair_data import PAIRS
from mixfuse.train.data.prepared import Prepared, cache_folder, facts, prepare
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import JudgeRecipe, TrainRecipe, kind_of


def prepare_data(recipe: TrainRecipe, *, resuming: bool = False) -> Prepared:
    """Tokenises what the cache does not hold yet. It needs the base's tokenizer and no torch model.

    Args:
        recipe: The recipe.
        resuming: Whether the run has a checkpoint; then data that has changed since it began is refused.

    Raises:
        MixfuseError: The data cannot be trained on, or has changed.
    """
    kind: Any = PAIRS if isinstance(recipe, JudgeRecipe) else CHATS
    return prepare(kind, recipe, load_tokenizer(recipe.base, recipe.chat_template), resuming=resuming)


def prepare_recipe(recipe_path: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs `mixfuse data prepare`.

    Returns:
        `{cache, data: [{name, folder, read, train, held_out, bytes}]}`.

    Raises:
        MixfuseError: The recipe is bad, or its data cannot be trained on.
    """
    recipe = load(recipe_path, kind_of(recipe_path, overrides), overrides)
    if not (recipe.base / "config.json").is_file():
        raise MixfuseError(f"base: {recipe.base} is not a model folder (no config.json)")
    sources = [*recipe.data, *((recipe.evaluation.data if recipe.evaluation else None) or ())]
    keep_apart([cache_folder(recipe)], [recipe.base, *(source.path for source in sources if source.path)])
    check_output(cache_folder(recipe), folder=True)
    done = prepare_data(recipe)
    rows = []
    for source, folder in zip(sources, [*done.train, *done.evaluation], strict=True):
        said = facts(folder)
        counts = {key: said[key] for key in ("read", "train", "held_out")}
        rows.append({"name": source.name, "folder": str(folder), **counts, "bytes": sum(said["sizes"].values())})
    return {"cache": str(cache_folder(recipe)), "data": rows}
