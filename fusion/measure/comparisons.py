"""Labelled pairs of answers to measure a judge by, read from our own file shapes and from public benchmarks'."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, read_json

Label = Literal["first", "second", "tie"]
Benchmark = Literal["judgebench", "llmbar", "rewardbench2"]

TIES = "Ties"
"""RewardBench 2's subset of prompts with several right answers; it has a scoring rule of its own."""

_LABELS: dict[str, Label] = {"A": "first", "B": "second", "tie": "tie"}
_JUDGEBENCH: dict[str, Label] = {"A>B": "first", "B>A": "second", "A=B": "tie"}
_LLMBAR: dict[str, Label] = {"1": "first", "2": "second"}


@dataclass(frozen=True)
class Comparison:
    """A labelled pair of answers.

    Attributes:
        prompt: The question; pairs of one prompt are drawn together for the intervals.
        first: The answer shown as A in the first order.
        second: The answer shown as B in the first order.
        label: The better answer, or "tie".
        models: The models that wrote the answers, where known.
        file: The last two parts of the file's path.
        source: The part of the file, where its rows name one (`source`, `subset`).
        benchmark: The benchmark whose official metrics the pair counts for.
        item: The id of the benchmark's row; one row may give several pairs.
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

    @property
    def better(self) -> str:
        """The better answer; of a tie the second."""
        return self.first if self.label == "first" else self.second

    @property
    def worse(self) -> str:
        """The worse answer; of a tie the first."""
        return self.second if self.label == "first" else self.first

    def toward_better(self, lean: float) -> float:
        """A lean towards the first answer (negative: the second) as a lean towards the better one."""
        return lean if self.label == "first" else -lean


def load(path: Path, *, limit: int | None = None, pairs_per_prompt: int = 4) -> list[Comparison]:
    """Reads pairs.

    The keys of a row tell which shape it has:

    - Labelled pairs: `prompt`, `response_a`, `response_b` (objects with a `text`), `label` A, B or tie.
    - Pool responses: `prompt`, `responses` with `model`, `text` and `correct`. Every answer marked correct is
      paired with every wrong one. Of more than `pairs_per_prompt` pairs, some are chosen by hash, the same every time.
      A hash also decides which answer of a pair is shown first.
    - JudgeBench (arXiv 2410.12784): `pair_id`, `question`, `response_A`, `response_B`, `label` A>B or B>A, `source`.
    - LLMBar (arXiv 2310.07641): `input`, `output_1`, `output_2`, `label` 1 or 2; one JSON array a file.
    - RewardBench 2 (arXiv 2506.01937): `id`, `prompt`, `chosen`, `rejected` (lists of texts), `subset`. Each right
      answer is paired with each wrong one.

    Args:
        path: The file, one JSON object a line, or one JSON array of objects.
        limit: Read only this many rows.
        pairs_per_prompt: The most pairs of one pool row.

    Raises:
        MixfuseError: A line is malformed or has none of these shapes (the message names file and line).
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
        raise MixfuseError(f"{path}: it holds no pairs to judge")
    return comparisons


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the position, `file:line`, or `file: row N` in an array; the row)."""
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
        return False  # `iter_jsonl` reports why the file cannot be read


def _pairs(row: dict[str, Any], file: str, most: int) -> list[Comparison]:
    if "response_a" in row:
        return [_labelled(row, file)]
    if "responses" in row:
        return _from_pool(row, file, most)
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


def _from_pool(row: dict[str, Any], file: str, most: int) -> list[Comparison]:
    prompt, source = _text(row["prompt"]), _text(row.get("source", ""))
    responses = [(_text(entry["text"]), entry["model"], entry["correct"]) for entry in map(_object, row["responses"])]
    pairs = [(good, bad) for good in responses if good[2] is True for bad in responses if bad[2] is False]
    usable = {(good[0], bad[0]): (good[1], bad[1]) for good, bad in pairs if good[0].strip() and bad[0].strip()}
    chosen = sorted(usable, key=lambda texts: _hash(prompt, *texts))[:most]
    return [_by_hash(prompt, *texts, models=usable[texts], file=file, source=source) for texts in chosen]


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
        _by_hash(prompt, right, wrong, models=None, file=file, source=subset, benchmark="rewardbench2", item=item)
        for right in good
        for wrong in bad
    ]


def _by_hash(prompt: str, good: str, bad: str, *, models: tuple[str, str] | None, **fields: Any) -> Comparison:
    """The pair; a hash of the texts puts the better answer first in half of all pairs."""
    if int(_hash(prompt, good, bad)[-1], 16) % 2:
        return Comparison(prompt, good, bad, "first", models, **fields)
    return Comparison(prompt, bad, good, "second", models and (models[1], models[0]), **fields)


def _hash(*texts: str) -> str:
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
