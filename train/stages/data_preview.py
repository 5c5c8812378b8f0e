"""`mixfuse data preview`: the chats of a recipe as the model will see them, and what is counted of its data."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data.chat_data import Example, example_of, nothing_left, read_chats
from mixfuse.train.data.chats import Found
from mixfuse.train.data.loss_mask import IGNORED
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import DataSource, JudgeRecipe, SftRecipe, kind_of

_GREEN, _PLAIN = "\033[1;32m", "\033[0m"
_MARKS = ("⟦", "⟧")


def preview(recipe_path: Path, overrides: list[str], *, chats: int = 3) -> dict[str, Any]:
    """Reads and tokenises all data of an SFT recipe, and keeps the first chats of each data set.

    Args:
        recipe_path: The recipe; of its base only the tokenizer is read.
        overrides: `dotted.key=value` strings.
        chats: How many chats of each data set to keep.

    Returns:
        `{data: [{name, rows, shapes, chats, tokens, learned, cut, cut_tokens, left_out, examples, empty_answers,
        unread, shown: [{id, where, tokens, parts: [{text, learned}]}], lines}]}`.

    Raises:
        MixfuseError: The recipe is a judge's, or its data cannot be trained on.
    """
    if kind_of(recipe_path, overrides) is JudgeRecipe:
        raise MixfuseError(f"{recipe_path} is a judge's recipe; data preview shows the chats of an SFT recipe")
    recipe = load(recipe_path, SftRecipe, overrides)
    if not (recipe.base / "config.json").is_file():
        raise MixfuseError(f"base: {recipe.base} is not a model folder (no config.json)")
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    sources = [*recipe.data, *((recipe.evaluation.data if recipe.evaluation else None) or ())]
    return {"data": [_of_source(source, recipe, tokenizer, chats) for source in sources]}


def _of_source(source: DataSource, recipe: SftRecipe, tokenizer: Any, most: int) -> dict[str, Any]:
    found = Found()
    counts = {"chats": 0, "tokens": 0, "learned": 0, "cut": 0, "cut_tokens": 0}
    shown: list[dict[str, Any]] = []
    for chat in read_chats(source, recipe, found):
        example = example_of(chat, tokenizer, recipe)
        if example.left_out:
            found.leave_out(example.left_out, example.reason or chat.where)
            continue
        ids, labels = example.encoded
        counts["chats"] += 1
        counts["tokens"] += len(ids)
        counts["learned"] += sum(label != IGNORED for label in labels)
        counts["cut"] += example.whole > len(ids)
        counts["cut_tokens"] += example.whole - len(ids)
        if len(shown) < most:
            parts = list(_parts(example, tokenizer))
            shown.append({"id": chat.id, "where": chat.where, "tokens": len(ids), "parts": parts})
    if not counts["chats"]:
        raise MixfuseError(f"{source.name}: {nothing_left(found, recipe)}")
    return {
        "name": source.name,
        "rows": found.rows,
        "shapes": dict(found.shapes),
        **counts,
        "left_out": dict(found.left_out),
        "examples": found.examples,
        "empty_answers": found.empty,
        "unread": list(found.unread),
        "shown": shown,
        "lines": found.lines(source.name),
    }


def _parts(example: Example, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The text of a chat in stretches that are learned and that are not."""
    ids, labels = example.encoded
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or (labels[place] == IGNORED) != (labels[start] == IGNORED):
            yield {"text": tokenizer.decode(ids[start:place]), "learned": labels[start] != IGNORED}
            start = place


def lines(report: dict[str, Any], *, colour: bool) -> Iterator[str]:
    """The preview as text: learned stretches in green or, without colour, in ⟦ ⟧."""
    before, after = (_GREEN, _PLAIN) if colour else _MARKS
    for data in report["data"]:
        for chat in data["shown"]:
            yield f"--- {chat['where']}: {chat['tokens']} tokens"
            yield "".join(
                f"{before}{_printable(part['text'])}{after}" if part["learned"] else _printable(part["text"])
                for part in chat["parts"]
            )
        if data["shown"]:
            yield "---"
        yield from data["lines"]
        counted = f"{_many(data['rows'], 'row')}, {_many(data['chats'], 'chat')} to train on, {data['tokens']} tokens"
        cut = f"; cut: {_many(data['cut'], 'chat')}, by {data['cut_tokens']} tokens" if data["cut"] else ""
        yield f"{data['name']}: {counted}, of which {data['learned']} are learned{cut}"
    yield f"Learned text is {'green' if colour else 'between ⟦ and ⟧'}."


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _printable(text: str) -> str:
    """Text without the control characters that a terminal would obey."""
    return "".join(
        char if char in "\n\t" or (char.isprintable() and char not in _MARKS) or char == " " else ascii(char)[1:-1]
        for char in text
    )


def in_colour() -> bool:
    """Whether standard output is a terminal that shows colours, by https://no-color.org."""
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
