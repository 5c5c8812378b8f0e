"""What the judge trains on: TRL's preference data sets, made of the files that `mixfuse pairs build` writes."""

import random
from typing import Any, NamedTuple

from datasets import Dataset

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.chat_data import is_held_out
from mixfuse.train.data.packing import mixed
from mixfuse.train.data.pairs import read_pairs
from mixfuse.train.recipe import DataSource, JudgeRecipe


class PairData(NamedTuple):
    """The data of a judge's run: TRL's preference data sets, each row with its `id`.

    Attributes:
        train: Shuffled by pair. If both orders are trained, the two orders of a pair are neighbours.
        evaluation: Held-out rows, or None.
    """

    train: Dataset
    evaluation: Dataset | None


def pairs_datasets(recipe: JudgeRecipe, tokenizer: Any) -> PairData:
    """Makes TRL's preference data sets, the two orders of a pair side by side.

    An even micro batch then holds both orders of each of its pairs, so that a preference for a position earns nothing.
    A pair longer than `max_length` in either order is left out, because truncation would cut off its verdict.

    Raises:
        MixfuseError: No pair fits, or one side of the split is empty.
    """
    evaluation = recipe.evaluation
    by_source = [_fitting(source, recipe, tokenizer) for source in recipe.data]
    held_out: list[_Pair] = []
    if evaluation and evaluation.share is not None:
        share = evaluation.share
        held_out = [pair for pairs in by_source for pair in pairs if is_held_out(pair[0]["id"], share)]
        by_source = [[pair for pair in pairs if not is_held_out(pair[0]["id"], share)] for pairs in by_source]
        if not held_out or not all(by_source):
            side = "the training share" if held_out else "the held-out share"
            raise MixfuseError(f"no pair is in {side}; change evaluation.share or name evaluation.data")
    for source in (evaluation.data if evaluation else None) or ():
        held_out += _fitting(source, recipe, tokenizer)
    everything = [pair for pairs in by_source for pair in pairs]
    weights = [source.weight for source in recipe.data]
    order = list(mixed([len(pairs) for pairs in by_source], weights, recipe.order_seed))
    random.Random(recipe.order_seed).shuffle(order)  # noqa: S311 - a reproducible order, not a secret
    orders = 2 if recipe.orders == "both" else 1
    train = Dataset.from_list([row for number in order for row in everything[number][:orders]])
    if evaluation and evaluation.limit:
        held_out = held_out[: max(1, evaluation.limit // 2)]
    rows = [row for pair in held_out for row in pair]
    return PairData(train, Dataset.from_list(rows) if rows else None)


_Pair = tuple[dict[str, Any], dict[str, Any]]


def _fitting(source: DataSource, recipe: JudgeRecipe, tokenizer: Any) -> list[_Pair]:
    """The pairs of a data set that fit `max_length` in both orders."""
    keys = ("id", "prompt", "chosen", "rejected")
    rows = [{**{key: row[key] for key in keys}, "margin": float(row.get("margin", 1.0))} for row in read_pairs(source)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    def fits(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=True, return_dict=False)
        return len(ids) <= recipe.max_length

    fitting = [pair for pair in pairs if all(map(fits, pair))]
    if not fitting:
        raise MixfuseError(f"{source.name}: no pair fits max_length {recipe.max_length}; raise it")
    if left_out := len(pairs) - len(fitting):
        print(f"{source.name}: left out {left_out} of {len(pairs)} pairs longer than {recipe.max_length} tokens")
    return fitting
