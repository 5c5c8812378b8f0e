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
    """What the judge trains on: TRL's preference data sets, each row with its `id`.

    Attributes:
        train: Shuffled by pair: the two orders of a pair are neighbours, where both are trained.
        evaluation: Held out, or nothing.
    """

    train: Dataset
    evaluation: Dataset | None


def pairs_datasets(recipe: JudgeRecipe, tokenizer: Any) -> PairData:
    """Makes TRL's preference data sets, the two orders of a pair side by side.

    So an even micro batch holds both orders of every pair in it, and a preference for a position earns nothing. A pair
    longer than `max_length` in either order is left out: truncated, it would lose its verdict.

    Raises:
        MixfuseError: No pair fits, or none is left on a side of the split.
    """
    evaluation = recipe.evaluation
    kept = [_fitting(source, recipe, tokenizer) for source in recipe.data]
    held_out: list[_Pair] = []
    if evaluation and evaluation.share is not None:
        share = evaluation.share
        held_out = [pair for pairs in kept for pair in pairs if is_held_out(pair[0]["id"], share)]
        kept = [[pair for pair in pairs if not is_held_out(pair[0]["id"], share)] for pairs in kept]
        if not held_out or not all(kept):
            side = "training" if held_out else "the held-out share"
            raise MixfuseError(f"no pair fell to {side}; change evaluation.share or name evaluation.data")
    for source in (evaluation.data if evaluation else None) or ():
        held_out += _fitting(source, recipe, tokenizer)
    everything = [pair for pairs in kept for pair in pairs]
    weights = [source.weight for source in recipe.data]
    order = list(mixed([len(pairs) for pairs in kept], weights, recipe.order_seed))
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

    kept = [pair for pair in pairs if all(map(fits, pair))]
    if not kept:
        raise MixfuseError(f"{source.name}: no pair fits max_length {recipe.max_length}; raise it")
    if left_out := len(pairs) - len(kept):
        print(f"{source.name}: left out {left_out} of {len(pairs)} pairs longer than {recipe.max_length} tokens")
    return kept
