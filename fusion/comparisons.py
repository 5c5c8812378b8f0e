"""Labelled pairs of answers to measure a judge by, from people's preferences or from checked answers."""

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mixfuse.errors import MixfuseError
from mixfuse.files import read_jsonl

_LABELS: dict[str, Literal["first", "second", "tie"]] = {"A": "first", "B": "second", "tie": "tie"}


@dataclass(frozen=True)
class Comparison:
    """A labelled pair of answers.

    Attributes:
        prompt: What was asked; pairs of one prompt stand or fall together in the intervals.
        first: The answer shown as A in the first order.
        second: The other.
        label: The better one, or "tie".
        models: Who wrote them, where known.
    """

    prompt: str
    first: str
    second: str
    label: Literal["first", "second", "tie"]
    models: tuple[str, str] | None = None


def load(path: Path, *, limit: int | None = None, pairs_per_prompt: int = 4) -> list[Comparison]:
    """Reads pairs from rows with `response_a`, `response_b` and `label`, or from pool responses.

    Of a pool row every answer marked correct stands against every wrong one; where that makes more than
    `pairs_per_prompt`, a choice by hash is taken, the same every time. Which of a pair is shown first is
    settled by hash too.

    Args:
        path: The file, one JSON object a line.
        limit: Only the first so many rows.
        pairs_per_prompt: The most pairs taken of one pool row.

    Raises:
        MixfuseError: A line is malformed or of neither shape (the message names file and line).
    """
    comparisons: list[Comparison] = []
    for index, row in enumerate(read_jsonl(path, required=["prompt"])[:limit]):
        try:
            if "response_a" in row:
                comparisons.append(_labelled(row))
            elif "responses" in row:
                comparisons.extend(_marked(row, pairs_per_prompt))
            else:
                raise ValueError("neither 'response_a' nor 'responses' is there: no pairs to judge")
        except KeyError as error:
            raise MixfuseError(f"{path}:{_line_number(path, index)}: missing key {error}") from None
        except (TypeError, ValueError) as error:
            raise MixfuseError(f"{path}:{_line_number(path, index)}: {error}") from None
    return comparisons


def _labelled(row: dict[str, Any]) -> Comparison:
    first, second, label = _object(row["response_a"]), _object(row["response_b"]), row["label"]
    if label not in _LABELS:
        raise ValueError(f"label {label!r} is none of {', '.join(_LABELS)}")
    named = "model" in first and "model" in second
    return Comparison(
        _text(row["prompt"]),
        _text(first["text"]),
        _text(second["text"]),
        _LABELS[label],
        (_text(first["model"]), _text(second["model"])) if named else None,
    )


def _marked(row: dict[str, Any], at_most: int) -> list[Comparison]:
    responses = [(one["model"], _text(one["text"]), one["correct"]) for one in map(_object, row["responses"])]
    pairs = [(good, bad) for good in responses if good[2] is True for bad in responses if bad[2] is False]
    prompt = _text(row["prompt"])

    def chance(pair: tuple[tuple[str, str, bool], tuple[str, str, bool]]) -> str:
        return hashlib.sha256("\0".join((prompt, *(text for _, text, _ in pair))).encode()).hexdigest()

    usable = {(good[1], bad[1]): (good, bad) for good, bad in pairs if good[1].strip() and bad[1].strip()}
    chosen = sorted(usable.values(), key=chance)[:at_most]
    return [
        Comparison(prompt, good[1], bad[1], "first", (good[0], bad[0]))
        if int(chance((good, bad))[-1], 16) % 2
        else Comparison(prompt, bad[1], good[1], "second", (bad[0], good[0]))
        for good, bad in chosen
    ]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object with a text, found {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _line_number(path: Path, index: int) -> int:
    """The line of the row of that index: blank lines are no rows."""
    with path.open(encoding="utf-8") as stream:
        rows = (number for number, line in enumerate(stream, start=1) if line.strip())
        return next(islice(rows, index, None))
