"""Labelled pairs of answers to measure a judge by, in our shapes and public benchmarks'; and a judge's marks."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, read_json
from mixfuse.contracts.judge_protocol import Calibration, Outcome, combine

Label = Literal["first", "second", "tie"]
Measure = Literal["both_orders_correct", "first_order", "order_averaged", "consistency"]
Benchmark = Literal["judgebench", "llmbar", "rewardbench2"]

_LABELS: dict[str, Label] = {"A": "first", "B": "second", "tie": "tie"}
_JUDGEBENCH: dict[str, Label] = {"A>B": "first", "B>A": "second", "A=B": "tie"}
_LLMBAR: dict[str, Label] = {"1": "first", "2": "second"}


@dataclass(frozen=True)
class Comparison:
    """A labelled pair of answers.

    Attributes:
        prompt: What was asked; pairs of one prompt stand or fall together in the intervals.
        first: The answer shown as A in the first order.
        second: The other.
        label: The better one, or "tie".
        models: Who wrote them, where known.
        file: The file it comes from, by its last two names.
        source: The part of the file, where its rows name one (`source`, `subset`).
        benchmark: Whose official metrics it counts for.
        item: The benchmark's own row, of which it may be one of several pairs.
    """

    prompt: str
    first: str
    second: str
    label: Label
    models: tuple[str, str] | None = None
    file: str = ""
    source: str = ""
    benchmark: Benchmark | None = None
    item: str = ""


class Views(NamedTuple):
    """P(the answer shown first is better), each way round; None where it could not be read."""

    forward: float | None
    backward: float | None

    def outcome(self, calibration: Calibration | None = None) -> Outcome:
        """What both say together."""
        return combine(self.forward, self.backward, calibration)


def marks(
    rows: Sequence[Comparison], views: Sequence[Views], measure: Measure, calibration: Calibration | None = None
) -> list[float]:
    """A judge's mark for each pair that people did not call a tie.

    Args:
        rows: The pairs.
        views: The judge's, in the same order.
        measure: `both_orders_correct`: right whichever answer was shown first; `first_order`: right in the first order,
            a verdict of exactly ½ or none being wrong; `order_averaged`: the mean over both orders is on the right
            side, exactly ½ counting half; `consistency`: both orders name the same answer.
        calibration: The judge's.
    """

    def mark(row: Comparison, view: Views) -> float:
        if measure == "first_order":
            return float(leans(view.forward) == row.label)
        outcome = view.outcome(calibration)
        if measure == "order_averaged":
            return credit(outcome.score - 0.5, row)
        return float(outcome.consistent if measure == "consistency" else outcome.winner == row.label)

    return [mark(row, view) for row, view in zip(rows, views, strict=True)]


def credit(leaning: float, row: Comparison) -> float:
    """1 where a leaning to the first answer (negative: the second) is right, 0 where wrong, ½ for none."""
    if math.isclose(leaning, 0.0, abs_tol=1e-9):
        return 0.5
    return float((leaning > 0) == (row.label == "first"))


def leans(p: float | None) -> Literal["first", "second", "nothing"]:
    """Which of the two answers, in the order they were shown, one verdict is for."""
    if p is None or p == 0.5:
        return "nothing"
    return "first" if p > 0.5 else "second"


def load(path: Path, *, limit: int | None = None, pairs_per_prompt: int = 4) -> list[Comparison]:
    """Reads pairs; every row says by its keys which shape it has.

    - Labelled pairs: `prompt`, `response_a`, `response_b` (objects with a `text`), `label` A, B or tie.
    - Pool responses: `prompt`, `responses` with `model`, `text` and `correct`. Every answer marked correct stands
      against every wrong one; where that makes more than `pairs_per_prompt`, a choice by hash is taken, the same every
      time. Which of a pair is shown first is settled by hash too.
    - JudgeBench (arXiv 2410.12784): `pair_id`, `question`, `response_A`, `response_B`, `label` A>B or B>A, `source`.
    - LLMBar (arXiv 2310.07641): `input`, `output_1`, `output_2`, `label` 1 or 2; one JSON array a file.
    - RewardBench 2 (arXiv 2506.01937): `id`, `prompt`, `chosen`, `rejected` (lists of texts), `subset`. Each right
      answer stands against each wrong one.

    Args:
        path: The file, one JSON object a line, or one JSON array of objects.
        limit: Only the first so many rows.
        pairs_per_prompt: The most pairs taken of one pool row.

    Raises:
        MixfuseError: A line is malformed or of none of these shapes (the message names file and line).
    """
    file = "/".join(path.resolve().parts[-2:])
    comparisons: list[Comparison] = []
    for place, row in islice(_rows(path), limit):
        try:
            comparisons.extend(_pairs(row, file, pairs_per_prompt))
        except KeyError as error:
            raise MixfuseError(f"{place}: missing key {error}") from None
        except (TypeError, ValueError) as error:
            raise MixfuseError(f"{place}: {error}") from None
    if not comparisons:
        raise MixfuseError(f"{path}: there are no pairs to judge in it")
    return comparisons


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, as `file:line` or `file: row N` of an array; the row)."""
    if not _is_array(path):
        for number, row in iter_jsonl(path):
            yield f"{path}:{number}", row
        return
    for number, row in enumerate(read_json(path), start=1):
        if not isinstance(row, dict):
            raise MixfuseError(f"{path}: row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}: row {number}", row


def _is_array(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(64).lstrip().startswith(b"[")
    except OSError:
        return False  # why it cannot be read is `iter_jsonl`'s to say


def _pairs(row: dict[str, Any], file: str, at_most: int) -> list[Comparison]:
    if "response_a" in row:
        return [_labelled(row, file)]
    if "responses" in row:
        return _marked(row, file, at_most)
    if "response_A" in row:
        return [_judgebench(row, file)]
    if "output_1" in row:
        return [_llmbar(row, file)]
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        return _rewardbench2(row, file)
    raise ValueError(
        "no pairs to judge: it has neither 'response_a', 'responses', 'response_A' (JudgeBench), 'output_1' (LLMBar) "
        "nor lists 'chosen' and 'rejected' (RewardBench 2)"
    )


def _labelled(row: dict[str, Any], file: str) -> Comparison:
    first, second = _object(row["response_a"]), _object(row["response_b"])
    named = "model" in first and "model" in second
    return Comparison(
        _text(row["prompt"]),
        _text(first["text"]),
        _text(second["text"]),
        _label(row, _LABELS),
        (_text(first["model"]), _text(second["model"])) if named else None,
        file,
        _text(row.get("source", "")),
    )


def _marked(row: dict[str, Any], file: str, at_most: int) -> list[Comparison]:
    prompt, source = _text(row["prompt"]), _text(row.get("source", ""))
    responses = [(_text(one["text"]), one["model"], one["correct"]) for one in map(_object, row["responses"])]
    pairs = [(good, bad) for good in responses if good[2] is True for bad in responses if bad[2] is False]
    usable = {(good[0], bad[0]): (good[1], bad[1]) for good, bad in pairs if good[0].strip() and bad[0].strip()}
    chosen = sorted(usable, key=lambda texts: _chance(prompt, *texts))[:at_most]
    return [_by_chance(prompt, *texts, models=usable[texts], file=file, source=source) for texts in chosen]


def _judgebench(row: dict[str, Any], file: str) -> Comparison:
    return Comparison(
        _text(row["question"]),
        _text(row["response_A"]),
        _text(row["response_B"]),
        _label(row, _JUDGEBENCH),
        None,
        file,
        _text(row["source"]),
        "judgebench",
        _text(row["pair_id"]),
    )


def _llmbar(row: dict[str, Any], file: str) -> Comparison:
    prompt, first, second = (_text(row[key]) for key in ("input", "output_1", "output_2"))
    label = _label({"label": str(row["label"])}, _LLMBAR)
    return Comparison(prompt, first, second, label, None, file, "", "llmbar")


def _rewardbench2(row: dict[str, Any], file: str) -> list[Comparison]:
    prompt, item, subset = _text(row["prompt"]), _text(row["id"]), _text(row["subset"])
    good, bad = ([_text(text) for text in row[key]] for key in ("chosen", "rejected"))
    if not good or not bad:
        raise ValueError("'chosen' and 'rejected' must each hold an answer")
    if subset == TIES and item.partition(":")[0] not in ("ref", "tied"):
        raise ValueError(f"the id {item!r} of a row of the subset {TIES} must begin with 'ref:' or 'tied:'")
    return [
        _by_chance(prompt, one, other, models=None, file=file, source=subset, benchmark="rewardbench2", item=item)
        for one in good
        for other in bad
    ]


TIES = "Ties"
"""RewardBench 2's subset with a rule of its own."""


def _by_chance(prompt: str, good: str, bad: str, *, models: tuple[str, str] | None, **fields: Any) -> Comparison:
    """The pair, the better one first in half of all cases."""
    if int(_chance(prompt, good, bad)[-1], 16) % 2:
        return Comparison(prompt, good, bad, "first", models, **fields)
    return Comparison(prompt, bad, good, "second", models and (models[1], models[0]), **fields)


def _chance(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()


def _label(row: dict[str, Any], known: dict[str, Label]) -> Label:
    label = row["label"]
    if label not in known:
        raise ValueError(f"label {label!r} is none of {', '.join(known)}")
    return known[label]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object with a text, found {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value
