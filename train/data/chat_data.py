"""What SFT trains on: chats tokenised to disk, divided, mixed by weight and, if the recipe says so, packed.

No data set is held in memory: the tokens are in the files of a cache (`prepared.py`), which are mapped, so that any row
can be read by its number. A resumed run reads the same rows in the same order: it depends on the recipe's seed alone.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts.chat_template import adapted, render
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.chats import Chat, Found, chats
from mixfuse.train.data.data_files import stop
from mixfuse.train.data.loss_mask import Encoded, encode
from mixfuse.train.data.packing import documents, mixed, packed
from mixfuse.train.data.prepared import Kind, Outcome, Prepared, noted, prepare
from mixfuse.train.recipe import DataSource, SftRecipe

if TYPE_CHECKING:
    from datasets import Dataset


class ChatData(NamedTuple):
    """The data of an SFT run.

    Attributes:
        train: Rows of `{documents: [{id, input_ids, labels}]}`, one document a row or, packed, several.
        evaluation: Held-out rows of `{id, input_ids, labels, set}`, or None. `set` names the data set; its rows are
            neighbours.
        chats: Number of training chats.
        table: The training chats in their order, not packed: rows of `{id, input_ids, labels, …}`, memory-mapped.
    """

    train: "Dataset"
    evaluation: "Dataset | None"
    chats: int
    table: "Dataset"


def chat_data(recipe: SftRecipe, tokenizer: Any, prepared: Prepared | None = None) -> ChatData:
    """The run's data. Every process calls this.

    Args:
        recipe: The run's recipe.
        tokenizer: The base's tokenizer.
        prepared: What `prepare` gave; by default the data is prepared here.

    Raises:
        MixfuseError: A data set is missing or malformed, or no chat is left to train on.
    """
    return _load(recipe, noted(prepared or prepare(CHATS, recipe, tokenizer), recipe.out))


def _keys(recipe: SftRecipe) -> list[Any]:
    return [recipe.loss_on, recipe.truncation, recipe.max_length, recipe.on_bad_row, recipe.empty_answers]


def _encode(chat: Chat, tokenizer: Any, recipe: SftRecipe, share: float | None) -> Outcome:
    example = example_of(chat, tokenizer, recipe)
    if example.left_out:
        return Outcome([], left_out=example.left_out, reason=example.reason or chat.where)
    ids, labels = example.encoded
    row = {"id": chat.id, "input_ids": ids, "labels": labels, "length": len(ids)}
    return Outcome([row], held_out=share is not None and is_held_out(json.dumps(chat.messages[:-1]), share))


def read_chats(source: DataSource, recipe: SftRecipe, found: Found) -> Iterator[Chat]:
    """The chats of a data set, by the recipe's `on_bad_row` and `empty_answers`.

    Raises:
        MixfuseError: The data set cannot be read, or it holds a bad row and the recipe does not skip these.
    """

    def skip(error: MixfuseError) -> None:
        found.leave_out(BAD, str(error))

    skips = recipe.on_bad_row == "skip"
    return chats(source, empty_answers=recipe.empty_answers == "learn", bad=skip if skips else stop, found=found)


def nothing_left(found: Found, recipe: SftRecipe) -> str:
    """Why no chat of a data set is left to train on, and what to do."""
    if set(found.left_out) <= {BAD, NOTHING_LEARNED}:
        reason = next((examples[0] for examples in found.examples.values()), "")
        whys = ", ".join(f"{count} {why}" for why, count in found.left_out.items())
        return f"no chat is left to train on ({whys}), for example {reason}"
    return f"no chat fits max_length {recipe.max_length}; raise it"


BAD = "that cannot be read or rendered"
NOTHING_LEARNED = "with no answer to learn (empty, or of weight 0)"


class Example(NamedTuple):
    """A chat as it is trained on.

    Attributes:
        encoded: Its tokens after truncation.
        whole: Its number of tokens before.
        left_out: Why it is left out, in words that follow "chats"; empty if it is not.
        reason: Of a bad row, the error.
    """

    encoded: Encoded
    whole: int
    left_out: str = ""
    reason: str = ""


def example_of(chat: Chat, tokenizer: Any, recipe: SftRecipe) -> Example:
    """Encodes a chat and truncates it to `max_length` as the recipe says.

    Raises:
        MixfuseError: The chat cannot be encoded and bad rows are not skipped, or it is too long and `truncation` is
            `error`.
    """
    try:
        _check_names(chat, tokenizer)
        encoded = encode(chat.messages, tokenizer, recipe.loss_on, tools=chat.tools or None, learned=chat.learned)
    except (MixfuseError, RecursionError) as error:
        text = f"{chat.where}: {'a value is nested too deep' if isinstance(error, RecursionError) else error}"
        if recipe.on_bad_row == "skip":
            return Example(Encoded([], []), 0, BAD, text)
        raise MixfuseError(text) from None
    whole = len(encoded.input_ids)
    if not encoded.learns:
        return Example(encoded, whole, NOTHING_LEARNED)
    if whole <= recipe.max_length:
        return Example(encoded, whole)
    if recipe.truncation == "error":
        raise MixfuseError(
            f"{chat.where}: the chat has {whole} tokens, more than max_length "
            f"{recipe.max_length}; raise it, or set truncation to drop, left or right"
        )
    if recipe.truncation == "drop":
        return Example(encoded, whole, f"longer than {recipe.max_length} tokens")
    cut = truncate(encoded, recipe.max_length, recipe.truncation)
    left_out = "" if cut.learns else f"with no token to learn from within {recipe.max_length} tokens"
    return Example(cut, whole, left_out)


def _check_names(chat: Chat, tokenizer: Any) -> None:
    """Checks that the template shows who a turn is from, where the row says it; a tool result's name is its call's.

    Raises:
        MixfuseError: It does not, so that the model would learn without it.
    """
    if not any("name" in message and message["role"] != "tool" for message in chat.messages):
        return
    keys: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
    plain = [{k: v for k, v in m.items() if k != "name" or m["role"] == "tool"} for m in chat.messages]
    texts = [render(adapted(messages, tokenizer), tokenizer, **keys) for messages in (chat.messages, plain)]
    if texts[0] == texts[1]:
        raise MixfuseError("the base's chat template leaves out 'name'; write it into the content, or remove it")


def truncate(encoded: Encoded, length: int, side: str) -> Encoded:
    """A chat of at most `length` tokens: `left` cuts its beginning, `right` its end, `drop` everything."""
    part = {"left": slice(-length, None), "right": slice(length), "drop": slice(0)}[side]
    ids, labels = encoded.input_ids[part], encoded.labels[part]
    return Encoded(ids, [-100, *labels[1:]] if labels else [])


def is_held_out(key: str, share: float) -> bool:
    """Whether an example with this key is in the held-out share. A hash decides, so equal keys are on the same side."""
    return int(hashlib.sha256(f"evaluation:{key}".encode()).hexdigest()[:8], 16) < share * 16**8


CHATS: Kind[Chat, SftRecipe] = Kind(
    plural="chats",
    columns={"id": "string", "input_ids": "tokens", "labels": "tokens", "length": "int32"},
    keys=_keys,
    read=read_chats,
    encode=_encode,
    nothing_left=nothing_left,
)
"""How chats are prepared."""


def _load(recipe: SftRecipe, prepared: Prepared) -> ChatData:
    from datasets import concatenate_datasets

    parts = prepared.training(recipe)
    everything = concatenate_datasets(parts)
    order = mixed([len(part) for part in parts], [source.weight for source in recipe.data], recipe.order_seed)
    if recipe.packing:
        all_lengths = everything.with_format("numpy")["length"][:]
        lengths = [int(all_lengths[number]) for number in order]
        bins = packed(lengths, recipe.max_length, recipe.order_seed)
        train = documents(everything, array("q", (order[i] for i in chain(*bins))), [0, *accumulate(map(len, bins))])
        if os.environ.get("RANK", "0") == "0":
            full = sum(lengths) / (len(bins) * recipe.max_length)
            print(f"packed {len(order)} chats into {len(bins)} rows of {recipe.max_length} tokens, {full:.0%} full")
    else:
        train = documents(everything, order, range(len(order) + 1))
    evaluation = None
    if recipe.evaluation:
        evaluation = prepared.held_out(recipe)
    return ChatData(train, evaluation, len(order), everything.select(order))
