"""The sources of preferences: each kind of source is read into pairs, with counts for the data card."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any, Literal

from mixfuse.app.pairs_spec import Source
from mixfuse.app.synthetic_pairs import read_synthetic
from mixfuse.app.verifiers import Check, check_of
from mixfuse.contracts import preferences
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data import pairs
from mixfuse.train.data.pairs import Preference
from mixfuse.train.data.sources import rows
from mixfuse.train.recipe import DataSource


@dataclass
class SourcePairs:
    """The pairs of one source, and counts for the data card."""

    preferences: list[Preference]
    counts: Counter[str] = field(default_factory=Counter)


def read_source(source: Source, *, seed: int, verdicts: Path, progress: bool) -> SourcePairs:
    """Reads the pairs of one source.

    Args:
        source: The source.
        seed: Seed of every random choice.
        verdicts: The file that stores a stronger judge's verdicts between calls.
        progress: Whether to show a bar on stderr.

    Raises:
        MixfuseError: The source is missing or has another shape, or a verifier fails.
    """
    if source.kind == "synthetic":
        return SourcePairs(*read_synthetic(source, seed))
    if source.kind == "judge":
        return _judged(source, seed, verdicts, progress)
    kind = _kind_of(source) if source.kind == "auto" else source.kind
    return {"pool": _pool, "references": _references, "labels": _labels, "traces": _traces}[kind](source)


def _kind_of(source: Source) -> Literal["pool", "labels"]:
    """What the first row of a file says it is."""
    _, first = next(rows(DataSource(path=Path(source.path)), wanted=preferences.KEYS))
    return "pool" if "responses" in first and not preferences.is_comparison(first) else "labels"


def _pool(source: Source) -> SourcePairs:
    rows = pairs.read_pool(Path(source.path), marked=source.verifier == "marked")
    return _of_rows(rows, source)


def _of_rows(rows: Sequence[dict[str, Any]], source: Source) -> SourcePairs:
    counts = Counter({"rows": len(rows)})
    found = []
    for row in _marked(rows, source, counts):
        row_preferences = pairs.of_pool(row, source=source.label)
        counts["usable rows"] += bool(row_preferences)
        found += row_preferences
    return SourcePairs(found, counts)


def _marked(rows: Sequence[dict[str, Any]], source: Source, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows with their answers as the source's verifier marks them; answers it cannot judge are left out."""
    if source.verifier == "marked":
        yield from rows
        return
    check = check_of(source.verifier)
    # Threads help verifiers that wait for a sandbox; the others take no time.
    with ThreadPoolExecutor(max(1, cpu_count() or 1)) as workers:
        marks = workers.map(lambda row: _marks(row, check), rows)
        for row, marked in zip(rows, marks, strict=True):
            counts["answers without a mark"] += len(row["responses"]) - len(marked)
            yield {**row, "responses": marked}


def _marks(row: dict[str, Any], check: Check) -> list[dict[str, Any]]:
    checked = [(response, check(row, response["text"])) for response in row["responses"]]
    return [{**response, "correct": right} for response, right in checked if right is not None]


def _references(source: Source) -> SourcePairs:
    rows = pairs.read_pool(Path(source.path), marked=source.verifier == "marked")
    counts = Counter({"rows": len(rows)})
    found = []
    for row in _marked(rows, source, counts):
        reference = row.get("reference")
        if not isinstance(reference, str) or not reference.strip():
            counts["rows without a reference"] += 1
            continue
        wrong = [response for response in row["responses"] if not response["correct"] and response["text"] != reference]
        right = {"model": "reference", "text": reference, "correct": True}
        found += pairs.of_pool({**row, "responses": [right, *wrong]}, source=source.label)
    return SourcePairs(found, counts)


def _labels(source: Source) -> SourcePairs:
    """The choices of people and benchmarks, in any public shape; the margin is the lead in votes or scores."""
    if source.verifier != "marked":
        raise MixfuseError(f"{source.path}: its rows hold choices between answers, so 'verifier' marks nothing in it")
    found = preferences.read(rows(DataSource(path=Path(source.path)), wanted=preferences.KEYS))
    counts = Counter({"rows": found.shapes.total()}) + found.left_out
    counts.update({f"rows of {shape}": count for shape, count in found.shapes.items()})
    return SourcePairs(pairs.of_comparisons(found.pairs, source=source.label, counts=counts), counts)


def _traces(source: Source) -> SourcePairs:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.store.export_traces import read as read_traces

    with opened(source.path, create=False) as database:
        since = 0.0 if source.days is None else time.time() - source.days * 86400
        rows, counts = read_traces(database, since=since, min_agreement=source.min_agreement)
    source_pairs = _of_rows(rows, source)
    return SourcePairs(source_pairs.preferences, Counter(counts) + source_pairs.counts)


def _judged(source: Source, seed: int, cache: Path, progress: bool) -> SourcePairs:
    """A stronger judge's choices; a pair counts only if both orders name the same answer."""
    from mixfuse.fusion.labels.labelling import AnswerPair, label

    if source.judge is None:
        raise AssertionError("checked by Source")
    rows = pairs.read_pool(Path(source.path), marked=False)
    candidates: list[tuple[AnswerPair, tuple[str, str] | None]] = []
    for row in rows:
        responses = [response for response in reversed(row["responses"]) if response["text"].strip()]
        answers = {response["text"]: response.get("model") for response in responses}
        couples = list(itertools.combinations(sorted(answers.items()), 2))
        rng = random.Random(f"{seed}:{row['prompt']!r}")  # noqa: S311 - a reproducible choice, not a secret
        for (first, author), (second, other) in rng.sample(couples, min(source.candidates, len(couples))):
            models = (str(author), str(other)) if author and other else None
            candidates.append((AnswerPair(row["prompt"], first, second), models))
    labels = asyncio.run(label(source.judge, [question for question, _ in candidates], cache=cache, progress=progress))
    counts = Counter({"rows": len(rows), "pairs": len(candidates), "calls made": labels.asked})
    counts.update({f"calls failed: {kind}": count for kind, count in labels.failed.items()})
    found = []
    for (question, models), outcome in zip(candidates, labels.outcomes, strict=True):
        if outcome is None or outcome.winner == "tie":
            counts["without a verdict" if outcome is None or outcome.parse_failures else "orders disagree"] += 1
            continue
        first_won = outcome.winner == "first"
        better, worse = (question.first, question.second)[:: 1 if first_won else -1]
        named = models and (models if first_won else models[::-1])
        margin = abs(2 * outcome.score - 1)
        found.append(Preference(question.prompt, better, worse, source.label, margin, named))
    return SourcePairs(found, counts)
