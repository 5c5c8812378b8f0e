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
from typing import Any

from mixfuse.app.pairs_spec import Source
from mixfuse.app.synthetic_pairs import read_synthetic
from mixfuse.app.verifiers import Check, check_of
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl
from mixfuse.train.data import pairs
from mixfuse.train.data.pairs import Preference

_VOTES = {"A": (1, "A", "first"), "B": (2, "B", "second")}
"""How a vote for each side is written: PandaLM's annotators say 1 and 2, and 0 for a tie."""


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
    return {"pool": _pool, "references": _references, "labels": _labels, "traces": _traces}[source.kind](source)


def _pool(source: Source) -> SourcePairs:
    rows = pairs.read_pool(Path(source.path), marked=source.verifier == "marked")
    return _of_rows(rows, source)


def _of_rows(rows: Sequence[dict[str, Any]], source: Source) -> SourcePairs:
    counts = Counter({"rows": len(rows)})
    preferences = []
    for row in _marked(rows, source, counts):
        row_preferences = pairs.of_pool(row, source=source.label)
        counts["usable rows"] += bool(row_preferences)
        preferences += row_preferences
    return SourcePairs(preferences, counts)


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
    preferences = []
    for row in _marked(rows, source, counts):
        reference = row.get("reference")
        if not isinstance(reference, str) or not reference.strip():
            counts["rows without a reference"] += 1
            continue
        wrong = [response for response in row["responses"] if not response["correct"] and response["text"] != reference]
        right = {"model": "reference", "text": reference, "correct": True}
        preferences += pairs.of_pool({**row, "responses": [right, *wrong]}, source=source.label)
    return SourcePairs(preferences, counts)


def _labels(source: Source) -> SourcePairs:
    """People's choices; the margin is the majority's lead in votes."""
    counts: Counter[str] = Counter()
    preferences = []
    for number, row in iter_jsonl(Path(source.path), required=("prompt", "response_a", "response_b", "label")):
        where = f"{source.path}:{number}"
        answers = (row["response_a"], row["response_b"])
        if not all(isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers):
            raise MixfuseError(f"{where}: response_a and response_b must be {{model, text}}")
        if not isinstance(row["prompt"], str) or row["label"] not in (*_VOTES, "tie"):
            raise MixfuseError(f"{where}: prompt must be a text and label one of A, B, tie")
        counts["rows"] += 1
        if row["label"] == "tie":
            counts["ties"] += 1
            continue
        better, worse = answers if row["label"] == "A" else answers[::-1]
        margin = _lead(row.get("votes"), row["label"], where)
        if margin <= 0:
            counts["labels without a majority of the votes"] += 1
            continue
        named = all(isinstance(answer.get("model"), str) for answer in answers)
        models = (better["model"], worse["model"]) if named else None
        preferences.append(Preference(row["prompt"], better["text"], worse["text"], source.label, margin, models))
    return SourcePairs(preferences, counts)


def _lead(votes: Any, label: str, where: str) -> float:
    """(votes for the label - votes against it) / all votes; 1 where there are none."""
    if votes is None or votes in ([], {}):
        return 1.0
    other = "B" if label == "A" else "A"
    if isinstance(votes, list):
        tally = Counter(
            next((side for side, spellings in _VOTES.items() if vote in spellings), "tie") for vote in votes
        )
    elif isinstance(votes, dict) and all(isinstance(count, int) for count in votes.values()):
        tally = Counter(votes)
    else:
        raise MixfuseError(f"{where}: votes must be a list of votes, or the numbers of votes for A, B and tie")
    return (tally[label] - tally[other]) / max(1, tally.total())


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
    preferences = []
    for (question, models), outcome in zip(candidates, labels.outcomes, strict=True):
        if outcome is None or outcome.winner == "tie":
            counts["without a verdict" if outcome is None or outcome.parse_failures else "orders disagree"] += 1
            continue
        first_won = outcome.winner == "first"
        better, worse = (question.first, question.second)[:: 1 if first_won else -1]
        named = models and (models if first_won else models[::-1])
        margin = abs(2 * outcome.score - 1)
        preferences.append(Preference(question.prompt, better, worse, source.label, margin, named))
    return SourcePairs(preferences, counts)
