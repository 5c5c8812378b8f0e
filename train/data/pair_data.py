"""What the judge trains on: comparisons with their verdicts, tokenised as TRL's preference data sets are.

The rows are in the files of a cache (`prepared.py`), which are mapped.
"""

import random
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts import chat_template
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.chat_data import BAD, is_held_out
from mixfuse.train.data.chats import Found
from mixfuse.train.data.data_files import stop
from mixfuse.train.data.packing import mixed
from mixfuse.train.data.pairs import Pair, Row, iter_pairs
from mixfuse.train.data.prepared import Kind, Outcome, Prepared, noted, prepare
from mixfuse.train.recipe import DataSource, JudgeRecipe

if TYPE_CHECKING:
    from datasets import Dataset


class PairData(NamedTuple):
    """The data of a judge's run: rows of `{id, prompt_ids, chosen_ids, rejected_ids, length, margin}`.

    `length` is the prompt's, in tokens.

    Attributes:
        train: Shuffled by pair. If both orders are trained, the two orders of a pair are neighbours.
        evaluation: Held-out rows, or None; each names its data set as `set`, and the rows of a set are neighbours.
    """

    train: "Dataset"
    evaluation: "Dataset | None"


def pairs_datasets(recipe: JudgeRecipe, tokenizer: Any, prepared: Prepared | None = None) -> PairData:
    """Makes TRL's preference data sets, the two orders of a pair side by side. Every process calls this.

    An even micro batch then holds both orders of each of its pairs, so that a preference for a position earns nothing.
    A pair longer than `max_length` in either order is left out, because truncation would cut off its verdict.

    Args:
        recipe: The run's recipe.
        tokenizer: The base's tokenizer.
        prepared: What `prepare` gave; by default the data is prepared here.

    Raises:
        MixfuseError: No pair fits, or one side of the split is empty.
    """
    from datasets import concatenate_datasets

    prepared = noted(prepared or prepare(PAIRS, recipe, tokenizer), recipe.out)
    parts = prepared.training(recipe)
    weights = [source.weight for source in recipe.data]
    order = list(mixed([len(part) // 2 for part in parts], weights, recipe.order_seed))
    random.Random(recipe.order_seed).shuffle(order)  # noqa: S311 - a reproducible order, not a secret
    orders = 2 if recipe.orders == "both" else 1
    numbers = array("q", (2 * pair + place for pair in order for place in range(orders)))
    train = concatenate_datasets(parts).select(numbers)
    return PairData(train, prepared.held_out(recipe) if recipe.evaluation else None)


class Placed(NamedTuple):
    """A pair and its place, for messages."""

    where: str
    pair: Pair


def _read(source: DataSource, recipe: JudgeRecipe, found: Found) -> Iterator[Placed]:
    def skip(error: MixfuseError) -> None:
        found.leave_out(BAD, str(error))

    for where, pair in iter_pairs(source, bad=skip if recipe.on_bad_row == "skip" else stop, found=found):
        yield Placed(where, pair)


def _encode(placed: Placed, tokenizer: Any, recipe: JudgeRecipe, share: float | None) -> Outcome:
    where, pair = placed
    try:
        rows = [_tokens(row, tokenizer) for row in pair]
    except (MixfuseError, RecursionError) as error:
        text = f"{where}: pair {pair[0]['id']}: {error}"
        if recipe.on_bad_row == "skip":
            return Outcome([], left_out=BAD, reason=text)
        raise MixfuseError(text) from None
    if any(row["length"] + max(map(len, (row["chosen_ids"], row["rejected_ids"]))) > recipe.max_length for row in rows):
        return Outcome([], left_out=f"longer than {recipe.max_length} tokens", reason=where)
    return Outcome(rows, held_out=share is not None and is_held_out(rows[0]["id"], share))


def _tokens(row: Row, tokenizer: Any) -> Row:
    """A comparison as TRL's trainer tokenises it: a completion begins where it and the prompt alone diverge.

    Raises:
        MixfuseError: The chat template refuses the messages, or leaves a part of them out.
    """
    whole = []
    for side in ("chosen", "rejected"):
        messages = [*row["prompt"], *row[side]]
        chat_template.render(messages, tokenizer)  # its errors are one line
        if lost := chat_template.left_out(messages, tokenizer):
            raise MixfuseError(f"the base's chat template leaves out {lost}")
        whole.append(tokenizer.apply_chat_template(messages, return_dict=False))
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    length = min(_common(prompt, ids) for ids in whole)
    chosen, rejected = (ids[length:] for ids in whole)
    ids = {"prompt_ids": prompt[:length], "chosen_ids": chosen, "rejected_ids": rejected}
    return {"id": str(row["id"]), **ids, "length": length, "margin": float(row.get("margin", 1.0))}


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    least = min(len(one), len(other))
    return next((place for place in range(least) if one[place] != other[place]), least)


def _keys(recipe: JudgeRecipe) -> list[Any]:
    return [recipe.max_length, recipe.on_bad_row]


def _nothing_left(found: Found, recipe: JudgeRecipe) -> str:
    if found.left_out.keys() <= {BAD}:
        return f"no pair is left to train on, for example {next(iter(found.examples.values()), [''])[0]}"
    return f"no pair fits max_length {recipe.max_length}; raise it"


PAIRS: Kind[Placed, JudgeRecipe] = Kind(
    plural="pairs",
    columns={
        "id": "string",
        "prompt_ids": "tokens",
        "chosen_ids": "tokens",
        "rejected_ids": "tokens",
        "length": "int32",
        "margin": "float64",
    },
    keys=_keys,
    read=_read,
    encode=_encode,
    nothing_left=_nothing_left,
    together=2,
)
"""How pairs are prepared."""
