"""`mixfuse pairs build`: preference pairs from several sources, filtered, with a data card.

Composes `train` (pairs and filters) with what the training room must not know: verifiers, the trace database, a
stronger judge behind HTTP.
"""

import asyncio
import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mixfuse.app.verifiers import Check, Verifier, check_of
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, read_json, sha256_file
from mixfuse.contracts.strict_yaml import Strict, load, validate
from mixfuse.fusion.config import ModelConfig
from mixfuse.train.data import data_card, pairs
from mixfuse.train.data.pair_filters import Filters, Selection, select
from mixfuse.train.data.pairs import Preference

Kind = Literal["pool", "references", "labels", "traces", "judge", "synthetic"]
Damage = Literal["truncate", "repeat", "number", "wrong_question"]

_LABELS = {"A": (1, "A", "first"), "B": (2, "B", "second")}
"""How a vote for each side is written: PandaLM's annotators say 1 and 2, and 0 for a tie."""
_QUESTION_KEYS = ("prompt", "question", "instruction", "input")
_SHOWN = re.compile(r"^\[question (\w+)\]\n(.*?)\n\[A \1\]\n", re.DOTALL)
_NUMBER = re.compile(r"\d+")


class Source(Strict):
    """One source of preferences.

    Attributes:
        kind: `pool`: right against wrong answers of pool rows. `references`: the reference answer against wrong ones.
            `labels`: people's choices between two answers. `traces`: the trace database's feedback. `judge`: a stronger
            judge's choices between a pool's answers. `synthetic`: a right answer against one that was made worse.
        path: The file; for `traces` the database's path or URL.
        name: What its pairs are called; by default the kind for synthetic ones, else the file's name.
        verifier: Who says which answers are right (`pool`, `references`, `synthetic`; for `traces` over feedback):
            `marked` (the rows themselves), `exact`, `number`, `json` or `regex` against the row's `reference`,
            `{tasks: FILE}`, `{python: module:function}`, `{tests: python}`. See `mixfuse.app.verifiers`.
        judge: For `judge`: the endpoint, as a model in a fusion config: `base_url`, `model`, `api_key_env`.
        candidates: For `judge`: how many pairs of a prompt it is asked about at most.
        min_agreement: For `traces`: as `mixfuse traces export --min-agreement`.
        days: For `traces`: only those of the last so many days.
        damage: For `synthetic`: what is done to right answers.
        weight: Sources with a weight are brought into that proportion by leaving pairs out.
        licence: As the data's owner states it; for the data card.
    """

    kind: Kind = "pool"
    path: str
    name: str = ""
    verifier: Verifier = "marked"
    judge: ModelConfig | None = None
    candidates: PositiveInt = 4
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    days: PositiveFloat | None = None
    damage: tuple[Damage, ...] = ("truncate", "repeat", "number", "wrong_question")
    weight: PositiveFloat | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "judge") != (self.judge is not None):
            raise ValueError("'judge', the endpoint, goes with kind: judge")
        if self.judge is not None and self.judge.base_url is None:
            raise ValueError("'judge' is reached at a 'base_url', with 'model'")
        if ":" in self.name:
            raise ValueError("'name' must not hold a colon")
        return self

    @property
    def called(self) -> str:
        """What its pairs are called."""
        stem = "traces" if self.kind == "traces" else Path(self.path).stem
        return self.name or ("synthetic" if self.kind == "synthetic" else stem).replace(":", "_")


class Hard(Strict):
    """Training pairs that a judge, as a rule the one that serves, does not know yet: a further round of training.

    Attributes:
        judge: The endpoint, as a model in a fusion config: `base_url`, `model`, `api_key_env`.
        keep: Share of the pairs it is right about in both orders that is kept all the same, so that they are not
            unlearned.
    """

    judge: ModelConfig
    keep: float = Field(default=0.25, ge=0, le=1)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.judge.base_url is None:
            raise ValueError("'judge' is reached at a 'base_url', with 'model'")
        return self


class PairsSpec(Filters):
    """What `mixfuse pairs build SPEC.yaml` reads: the filters' keys, and those of the sources.

    Attributes:
        sources: Where preferences come from.
        against: Files of evaluation sets; whatever they ask is not trained on.
        hard: Of the training pairs left by the filters, mostly those that this judge gets wrong or flips.
        seed: Of every choice.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    against: tuple[Path, ...] = ()
    hard: Hard | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _names_apart(self) -> Self:
        names = Counter(source.called for source in self.sources)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"several sources are called {twice[0]!r}; give each a 'name'")
        return self


def read_spec(path: Path, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> PairsSpec:
    """Reads a spec; or makes one for a single file of pool rows, of which nothing is left out unless asked for.

    Args:
        path: A `.yaml` file, or pool rows.
        settings: Keys of a spec, over those in the file.
        overrides: `key=value`, for a spec.

    Raises:
        MixfuseError: The spec is wrong.
    """
    if path.suffix in (".yaml", ".yml"):
        return load(path, PairsSpec, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())])
    if overrides:
        raise MixfuseError(f"{path} is no spec (.yaml), so {overrides[0]!r} is no key of it; there are options for it")
    plain = {"sources": [{"path": str(path)}], "balance": [], "near": None}
    return validate({**plain, **settings}, PairsSpec, source=f"mixfuse pairs build {path}")


@dataclass
class _Read:
    """One source as it was read."""

    preferences: list[Preference]
    counts: Counter[str] = field(default_factory=Counter)


def build(spec: PairsSpec, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Builds pairs, and beside them the dev pairs and a data card.

    Args:
        spec: The sources and filters.
        out: Where the training pairs go: `NAME.jsonl`; beside it go `NAME.dev.jsonl`, `NAME.card.md`, `NAME.card.json`
            and, with matplotlib, `NAME.card.png`. A stronger judge's verdicts are kept in `NAME.verdicts.sqlite3`.
        progress: Show bars on stderr.

    Returns:
        The data card's JSON.

    Raises:
        MixfuseError: A source is missing or of another shape, a verifier fails, or nothing is left to train on (kind
            "no_pairs").
    """
    for source in spec.sources:
        if source.kind == "traces":
            refuse_password(source.path)
    read = [_read(source, spec, out, progress) for source in spec.sources]
    against = [prompt for path in spec.against for prompt in questions(path)]
    everything = [preference for one in read for preference in one.preferences]
    if not everything:
        where = ", ".join(source.path for source in spec.sources)
        raise MixfuseError(
            f"{where}: no prompt has both a right and a wrong answer, so there is nothing to prefer", kind="no_pairs"
        )
    weights = {source.called: source.weight for source in spec.sources if source.weight is not None}
    selection = select(everything, spec, against=against, weights=weights, seed=spec.seed)
    if spec.hard is not None and selection.train:
        selection = _hard(spec.hard, selection, spec.seed, _verdicts(out), progress)
    if not selection.train:
        taken = ", ".join(f"{reason} {count}" for reason, count in selection.left_out.items() if count)
        raise MixfuseError(f"{out}: of {len(everything)} pairs none is left to train on ({taken})", kind="no_pairs")
    counts = pairs.write(out, selection.train, selection.dev, seed=spec.seed)
    facts = [
        {
            "name": source.called,
            "kind": source.kind,
            "path": source.path,
            "sha256": sha256_file(Path(source.path)) if source.kind != "traces" else None,
            "licence": source.licence,
            "weight": source.weight,
            "read": dict(one.counts),
        }
        for source, one in zip(spec.sources, read, strict=True)
    ]
    return data_card.write(out, selection, sources=facts, filters=spec, counts=counts)


def refuse_password(database: str) -> None:
    """Makes sure that a database's path or URL may be written down beside what is made of it.

    Raises:
        MixfuseError: It holds a password; the message does not.
    """
    if urlsplit(database).password:
        raise MixfuseError(
            "the trace database's URL holds a password and would be written down with it; leave it to PGPASSWORD or "
            "~/.pgpass"
        )


def questions(path: Path) -> list[str]:
    """The prompts of an evaluation set, or of any other file here.

    Understood are rows with `prompt` (a text, or a comparison of a pairs file), `messages`, or the `question`,
    `instruction` or `input` of public benchmarks; JSON lines, or one JSON list.

    Raises:
        MixfuseError: The file is missing, or a row has none of them.
    """
    if path.suffix == ".json":
        listed = read_json(path)
        if not isinstance(listed, list):
            raise MixfuseError(f"{path}: expected a list of rows")
        rows: Iterator[tuple[int, Any]] = enumerate(listed, start=1)
    else:
        rows = iter_jsonl(path)
    return [_asked(row, f"{path}:{number}") for number, row in rows]


def _asked(row: Any, where: str) -> str:
    found = next((row[key] for key in _QUESTION_KEYS if key in row), None) if isinstance(row, dict) else None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        said = [one.get("content") for one in row["messages"] if isinstance(one, dict) and one.get("role") == "user"]
        found = said[0] if said else None
    elif isinstance(found, list) and found and isinstance(found[-1], dict):
        shown = _SHOWN.match(str(found[-1].get("content")))
        found = shown[2] if shown else None
    if not isinstance(found, str):
        raise MixfuseError(f"{where}: no prompt is there: neither {', '.join(_QUESTION_KEYS)} nor messages")
    return found


def _read(source: Source, spec: PairsSpec, out: Path, progress: bool) -> _Read:
    if source.kind == "synthetic":
        return _synthetic(source, spec.seed)
    if source.kind == "judge":
        return _judged(source, spec.seed, _verdicts(out), progress)
    return {"pool": _pool, "references": _references, "labels": _labels, "traces": _traces}[source.kind](source)


def _pool(source: Source) -> _Read:
    rows = pairs.read_pool(Path(source.path), marked=source.verifier == "marked")
    return _of_rows(rows, source)


def _of_rows(rows: Sequence[dict[str, Any]], source: Source) -> _Read:
    counts = Counter({"rows": len(rows)})
    found = []
    for row in _marked(rows, source, counts):
        own = pairs.of_pool(row, source=source.called)
        counts["usable rows"] += bool(own)
        found += own
    return _Read(found, counts)


def _marked(rows: Sequence[dict[str, Any]], source: Source, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows with those answers that the source's verifier knows something of."""
    if source.verifier == "marked":
        yield from rows
        return
    check = check_of(source.verifier)
    # Threads, for those that wait for a sandbox; answers are few words for the others.
    with ThreadPoolExecutor(max(1, cpu_count() or 1)) as workers:
        marks = workers.map(lambda row: _marks(row, check), rows)
        for row, known in zip(rows, marks, strict=True):
            counts["answers without a mark"] += len(row["responses"]) - len(known)
            yield {**row, "responses": known}


def _marks(row: dict[str, Any], check: Check) -> list[dict[str, Any]]:
    asked = [(one, check(row, one["text"])) for one in row["responses"]]
    return [{**one, "correct": right} for one, right in asked if right is not None]


def _references(source: Source) -> _Read:
    rows = pairs.read_pool(Path(source.path), marked=source.verifier == "marked")
    counts = Counter({"rows": len(rows)})
    found = []
    for row in _marked(rows, source, counts):
        reference = row.get("reference")
        if not isinstance(reference, str) or not reference.strip():
            counts["rows without a reference"] += 1
            continue
        wrong = [one for one in row["responses"] if not one["correct"] and one["text"] != reference]
        own = {"model": "reference", "text": reference, "correct": True}
        found += pairs.of_pool({**row, "responses": [own, *wrong]}, source=source.called)
    return _Read(found, counts)


def _labels(source: Source) -> _Read:
    """People's choices; the margin is the majority's lead in votes."""
    counts: Counter[str] = Counter()
    found = []
    for number, row in iter_jsonl(Path(source.path), required=("prompt", "response_a", "response_b", "label")):
        where = f"{source.path}:{number}"
        answers = (row["response_a"], row["response_b"])
        if not all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in answers):
            raise MixfuseError(f"{where}: response_a and response_b must be {{model, text}}")
        if not isinstance(row["prompt"], str) or row["label"] not in (*_LABELS, "tie"):
            raise MixfuseError(f"{where}: prompt must be a text and label one of A, B, tie")
        counts["rows"] += 1
        if row["label"] == "tie":
            counts["ties"] += 1
            continue
        better, worse = answers if row["label"] == "A" else answers[::-1]
        margin = _lead(row.get("votes"), row["label"], where)
        if margin <= 0:
            counts["labels that the votes do not carry"] += 1
            continue
        named = all(isinstance(one.get("model"), str) for one in answers)
        models = (better["model"], worse["model"]) if named else None
        found.append(Preference(row["prompt"], better["text"], worse["text"], source.called, margin, models))
    return _Read(found, counts)


def _lead(votes: Any, label: str, where: str) -> float:
    """(votes for the label - votes against it) / all votes; 1 where there are none."""
    if votes is None or votes in ([], {}):
        return 1.0
    other = "B" if label == "A" else "A"
    if isinstance(votes, list):
        tally = Counter(next((side for side, written in _LABELS.items() if vote in written), "tie") for vote in votes)
    elif isinstance(votes, dict) and all(isinstance(count, int) for count in votes.values()):
        tally = Counter(votes)
    else:
        raise MixfuseError(f"{where}: votes must be a list of votes, or how many there are for A, B and tie")
    return (tally[label] - tally[other]) / max(1, tally.total())


def _traces(source: Source) -> _Read:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.store.export_traces import read as exported

    with opened(source.path, create=False) as database:
        since = 0.0 if source.days is None else time.time() - source.days * 86400
        rows, counts = exported(database, since=since, min_agreement=source.min_agreement)
    read = _of_rows(rows, source)
    return _Read(read.preferences, Counter(counts) + read.counts)


def _judged(source: Source, seed: int, cache: Path, progress: bool) -> _Read:
    """A stronger judge's choices, where both orders name the same answer."""
    from mixfuse.fusion.labels.labelling import Question, label

    if source.judge is None:
        raise AssertionError("checked by Source")
    rows = pairs.read_pool(Path(source.path), marked=False)
    asked: list[tuple[Question, tuple[str, str] | None]] = []
    for row in rows:
        answers = {one["text"]: one.get("model") for one in reversed(row["responses"]) if one["text"].strip()}
        couples = list(itertools.combinations(sorted(answers.items()), 2))
        rng = random.Random(f"{seed}:{row['prompt']!r}")  # noqa: S311 - a reproducible choice, not a secret
        for (first, author), (second, other) in rng.sample(couples, min(source.candidates, len(couples))):
            models = (str(author), str(other)) if author and other else None
            asked.append((Question(row["prompt"], first, second), models))
    labels = asyncio.run(label(source.judge, [one for one, _ in asked], cache=cache, progress=progress))
    counts = Counter({"rows": len(rows), "pairs": len(asked), "calls made": labels.asked})
    counts.update({f"calls failed: {kind}": count for kind, count in labels.failed.items()})
    found = []
    for (question, models), outcome in zip(asked, labels.outcomes, strict=True):
        if outcome is None or outcome.winner == "tie":
            counts["without a verdict" if outcome is None or outcome.parse_failures else "orders disagree"] += 1
            continue
        first_won = outcome.winner == "first"
        better, worse = (question.first, question.second)[:: 1 if first_won else -1]
        named = models and (models if first_won else models[::-1])
        margin = abs(2 * outcome.score - 1)
        found.append(Preference(question.prompt, better, worse, source.called, margin, named))
    return _Read(found, counts)


def _hard(hard: Hard, selection: Selection, seed: int, cache: Path, progress: bool) -> Selection:
    """The selection with those training pairs the judge is wrong about or flips, and a share of the others.

    A pair whose calls failed stays. What is left need not be balanced any more: a judge that goes by length is wrong
    where the shorter answer is the better one.
    """
    from mixfuse.fusion.labels.labelling import Question, label

    asked = [Question(one.prompt, one.better, one.worse) for one in selection.train]
    labels = asyncio.run(label(hard.judge, asked, cache=cache, progress=progress))
    rng = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    kept = [
        preference
        for preference, outcome in zip(selection.train, labels.outcomes, strict=True)
        if outcome is None or outcome.winner != "first" or rng.random() < hard.keep
    ]
    return selection.with_train(kept, "known to the judge")


def _verdicts(out: Path) -> Path:
    """Where what judges said of pairs is kept."""
    return out.with_name(f"{out.stem}.verdicts.sqlite3")


def _synthetic(source: Source, seed: int) -> _Read:
    """A right answer against the same answer made worse, or the right answer to another prompt.

    Raises:
        MixfuseError: A row holds no right answer in any way that is understood.
    """
    counts: Counter[str] = Counter()
    rights: list[tuple[str, str]] = []
    for number, row in iter_jsonl(Path(source.path)):
        counts["rows"] += 1
        prompt, right = _asked(row, f"{source.path}:{number}"), _right(row)
        if right is None:
            counts["rows without a right answer"] += 1
        else:
            rights.append((prompt, right))
    by_length = sorted(rights, key=lambda pair: (len(pair[1]), pair))
    found = []
    for place, (prompt, right) in enumerate(by_length):
        rng = random.Random(hashlib.sha256(f"{seed}:{prompt!r}".encode()).digest())  # noqa: S311 - no secret
        for damage in source.damage:
            worse = _damaged(right, damage, rng) if damage != "wrong_question" else _other(by_length, place)
            if worse is None or worse == right:
                counts[f"not made: {damage}"] += 1
            else:
                found.append(Preference(prompt, right, worse, f"{source.called}:{damage}"))
    return _Read(found, counts)


def _right(row: dict[str, Any]) -> str | None:
    """The reference, the first answer marked correct, or what the assistant says in the end."""
    said = [one for one in row.get("messages") or () if isinstance(one, dict) and one.get("role") == "assistant"]
    marked = [one.get("text") for one in row.get("responses") or () if isinstance(one, dict) and one.get("correct")]
    for text in (row.get("reference"), *marked[:1], said[-1].get("content") if said else None):
        if isinstance(text, str) and text.strip():
            return text
    return None


def _damaged(text: str, damage: Damage, rng: random.Random) -> str | None:
    """The text made worse; None where it cannot be."""
    if damage == "number":
        found = list(_NUMBER.finditer(text))
        if not found:
            return None
        last = found[-1]
        # As many digits, so that its length gives nothing away.
        digits = list(last[0])
        place = rng.randrange(len(digits))
        first = "123456789" if place == 0 and len(digits) > 1 else "0123456789"
        digits[place] = rng.choice([digit for digit in first if digit != digits[place]])
        return text[: last.start()] + "".join(digits) + text[last.end() :]
    words = list(re.finditer(r"\S+", text))
    if len(words) < 8:
        return None
    cut = words[round(len(words) * rng.uniform(0.4, 0.8))].start()
    if damage == "truncate":
        return text[:cut].rstrip()
    return f"{text} {text[cut:]}"  # the end said twice: longer by what cutting it would have made it shorter


def _other(rights: Sequence[tuple[str, str]], place: int) -> str | None:
    """The answer nearest in length that belongs to another prompt."""
    prompt, right = rights[place]
    for distance in range(1, len(rights)):
        for neighbour in (place - distance, place + distance):
            if 0 <= neighbour < len(rights) and rights[neighbour][0] != prompt and rights[neighbour][1] != right:
                return rights[neighbour][1]
    return None
