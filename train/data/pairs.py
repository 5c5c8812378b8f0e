"""Preference pairs for the judge, written through the judge protocol.

A pair is one comparison of a better with a worse answer: the prompt is the comparison, `chosen` the verdict for the
better answer, `rejected` the other verdict. Every pair is written in both orders, in two neighbouring rows, so that
training can put them into one batch, where a preference for a position earns nothing. The authors' names serve the
filters and the data card; they are not written to the file.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol, preferences
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, refuse_halves, sha256_json, write_jsonl
from mixfuse.contracts.preferences import Comparison
from mixfuse.train.data.chats import Found
from mixfuse.train.data.data_files import OnBad, stop
from mixfuse.train.data.sources import rows
from mixfuse.train.recipe import DataSource

POOL = "pool"
"""The default source of a pair."""
Row = dict[str, Any]
Pair = tuple[Row, Row]
"""The two orders of a pair."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One better and one worse answer to a prompt.

    Attributes:
        prompt: The question.
        better: The better answer.
        worse: The worse answer.
        source: Where the preference comes from, for counts and weights.
        margin: Its strength in (0, 1]: the majority of votes, a stronger judge's confidence; 1 for a verified answer.
        models: The authors of the better and the worse answer, if known. Never written to a file.
        conversation: The messages of a prompt that is more than one question; the judge reads them in their roles, in
            training as in judging.
    """

    prompt: str
    better: str
    worse: str
    source: str = POOL
    margin: float = 1.0
    models: tuple[str, str] | None = None
    conversation: tuple[dict[str, Any], ...] | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """A hash of the prompt: all pairs of a prompt share it, and it names no model."""
        return _digest(self.prompt)[:16]

    @property
    def key(self) -> str:
        """A hash of the pair. Random choices among pairs are drawn by it, so that they are reproducible."""
        return _digest("\0".join((self.prompt, self.better, self.worse)))


def is_dev(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the dev side, whatever else is in the data."""
    return int(_digest(f"dev:{prompt}")[:8], 16) / 16**8 < share


def build(pool: Path, out: Path, *, per_prompt: int = 2, dev_share: float = 0.1, seed: int = 0) -> dict[str, int]:
    """Builds preference pairs from pool responses without filters.

    `mixfuse.app.preferences.build` does the same for several sources, with filters.

    Args:
        pool: JSONL of `{id, prompt, reference, responses: [{model, text, correct}]}`, with `messages` where a prompt is
            a conversation.
        out: The file of training pairs; the dev pairs go beside it, as `NAME.dev.jsonl`.
        per_prompt: At most this many pairs of answers a prompt, so that no prompt dominates.
        dev_share: Share of the *prompts* held out for dev; a prompt is never on both sides.
        seed: Seed of the choice of pairs, their order and the fence nonces.

    Returns:
        Counts: `prompts`, `usable_prompts`, `train_pairs`, `dev_pairs` (rows; two a pair of answers).

    Raises:
        MixfuseError: A row has another shape, or no prompt has both a right and a wrong answer.
    """
    prompts = read_pool(pool)
    sides: dict[bool, list[Preference]] = {False: [], True: []}
    usable = 0
    for row in prompts:
        pairs = of_pool(row)
        usable += bool(pairs)
        rng = random.Random(f"{seed}:{row['id']}")  # noqa: S311 - a reproducible choice, not a secret
        sides[is_dev(row["prompt"], dev_share)].extend(rng.sample(pairs, min(per_prompt, len(pairs))))
    if not usable:
        raise MixfuseError(f"{pool}: no prompt has both a right and a wrong answer, so there is nothing to prefer")
    counts = write(out, sides[False], sides[True], seed=seed)
    return {"prompts": len(prompts), "usable_prompts": usable, **counts}


def of_pool(row: Mapping[str, Any], *, source: str = POOL) -> list[Preference]:
    """Every distinct right answer of a pool row against every distinct wrong one, in a reproducible order."""
    right, wrong = (
        {answer["text"]: answer.get("model") for answer in reversed(row["responses"]) if answer["correct"] is correct}
        for correct in (True, False)
    )
    conversation = tuple(row["messages"]) if row.get("messages") else None
    return [
        Preference(
            row["prompt"],
            good,
            bad,
            source,
            models=(str(author), str(other)) if author and other else None,
            conversation=conversation,
        )
        for good, author in sorted(right.items())
        for bad, other in sorted(wrong.items())
        if bad not in right and good.strip() and bad.strip()
    ]


def of_comparisons(
    comparisons: Iterable[Comparison], *, source: str, counts: Counter[str] | None = None
) -> list[Preference]:
    """The preferences of people or benchmarks; what cannot be preferred is counted.

    Args:
        comparisons: From `preferences.read`.
        source: The name of the pairs.
        counts: Gets what is left out: `ties`, `labels without a majority of the votes`, `empty answers`.
    """
    counts = Counter() if counts is None else counts
    found = []
    for pair in comparisons:
        if pair.label == "tie":
            counts["ties"] += 1
        elif pair.margin <= 0:
            counts["labels without a majority of the votes"] += 1
        elif not pair.better.strip() or not pair.worse.strip():
            counts["empty answers"] += 1
        else:
            models = pair.models if pair.models is None or pair.label == "first" else pair.models[::-1]
            found.append(
                Preference(pair.prompt, pair.better, pair.worse, source, pair.margin, models, pair.conversation)
            )
    return found


def write(out: Path, train: Sequence[Preference], dev: Sequence[Preference], *, seed: int = 0) -> dict[str, int]:
    """Writes both orders of every pair; the dev pairs go beside `out`, as `NAME.dev.jsonl`.

    Returns:
        `train_pairs` and `dev_pairs`: rows, two a pair.

    Raises:
        MixfuseError: There is no training pair, or a file cannot be written.
    """
    if not train:
        raise MixfuseError(f"{out}: every usable prompt is in dev; collect more prompts or lower --dev-share")
    dev_rows = write_jsonl(dev_path(out), _both_orders(dev, seed))
    return {"train_pairs": write_jsonl(out, _both_orders(train, seed)), "dev_pairs": dev_rows}


def dev_path(out: Path) -> Path:
    """The file of the dev pairs that belongs to a pairs file."""
    return out.with_name(f"{out.stem}.dev.jsonl")


def read_pool(path: Path, *, marked: bool = True) -> list[dict[str, Any]]:
    """Reads pool responses.

    Args:
        path: The file.
        marked: Whether each response must have `correct`.

    Raises:
        MixfuseError: The file is missing, empty, or a row has another shape.
    """
    read = []
    for number, row in iter_jsonl(path):
        if "prompt" not in row or "responses" not in row:
            compared = "this is a comparison, which a source with kind: labels reads"
            what = compared if preferences.is_comparison(row) else preferences.what_it_is(row)
            missing = next(key for key in ("prompt", "responses") if key not in row)
            raise MixfuseError(f"{path}:{number}: no pool row, {missing!r} is missing: {what}")
        refuse_halves(row, f"{path}:{number}")
        read.append({"id": sha256_json(row)[:16], **row})
    if not read:
        raise MixfuseError(f"{path}: the data set is empty")
    for row in read:
        responses = row["responses"]
        if not isinstance(row["prompt"], str):
            raise MixfuseError(f"{path}: row {row['id']!r}: prompt must be a string")
        if not isinstance(responses, list) or not all(
            isinstance(r, dict)
            and isinstance(r.get("text"), str)
            and (not marked or isinstance(r.get("correct"), bool))
            for r in responses
        ):
            shape = "{model, text, correct}" if marked else "{model, text}"
            raise MixfuseError(f"{path}: row {row['id']!r}: responses must be a list of {shape}")
        messages = row.get("messages") or []
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise MixfuseError(f"{path}: row {row['id']!r}: messages must be a list of {{role, content}}")
    return read


def read_pairs(source: Path | DataSource) -> list[Row]:
    """All rows of `iter_pairs`, the two orders of each pair in neighbouring rows."""
    source = source if isinstance(source, DataSource) else DataSource(path=source)
    found = Found()
    read = [row for _, pair in iter_pairs(source, found=found) for row in pair]
    print(*found.lines(source.name, "pairs"), sep="\n")
    return read


def iter_pairs(source: DataSource, *, bad: OnBad = stop, found: Found) -> Iterator[tuple[str, Pair]]:
    """Reads a pairs file pair by pair: the two orders of each are in neighbouring rows.

    Public preference data is read as well, and made into pairs of both orders as it is: nothing is filtered. Its
    comparisons are held in memory, because the answers to one prompt may be spread over the rows.

    Args:
        source: The data set.
        bad: What to do about a row that is malformed or lacks the other order; by default the error is raised.
        found: Gets the rows and the shapes.

    Yields:
        The place of a pair, and its two rows.

    Raises:
        MixfuseError: The data set is missing or empty, was written with another judge protocol, or an order is missing;
            or it holds no comparisons.
    """

    def refuse(error: MixfuseError) -> None:
        found.rows += 1
        bad(error)

    placed = rows(source, wanted=preferences.KEYS, bad=refuse)
    first = next(placed, None)
    if first is None:
        return
    placed = chain([first], placed)
    if "protocol" not in first[1]:
        yield from _public_pairs(source, first, placed, refuse, found)
        return
    waiting: tuple[str, Row] | None = None
    for where, row in placed:
        problem = _no_pair_row(row)
        if problem:
            refuse(MixfuseError(f"{where}: {problem}"))
        elif waiting is None:
            waiting = where, row
        elif _is_one_pair(waiting[1], row):
            found.rows += 1
            found.shapes["pair"] += 2
            yield waiting[0], (waiting[1], row)
            waiting = None
        else:
            refuse(_lonely(waiting[0]))
            waiting = where, row
    if waiting is not None:
        refuse(_lonely(waiting[0]))


def _lonely(where: str) -> MixfuseError:
    return MixfuseError(f"{where}: the row lacks the other order of its pair; build the pairs again")


def _no_pair_row(row: Row) -> str:
    """Why a row is none of a pair that this version can train on, or nothing."""
    missing = next((key for key in ("id", "prompt", "chosen", "rejected", "protocol") if key not in row), None)
    if missing is not None:
        return f"missing key {missing!r}"
    if not all(isinstance(row[key], list) and row[key] for key in ("prompt", "chosen", "rejected")):
        return "prompt, chosen and rejected must be lists of messages; build the pairs again"
    if row["protocol"] != judge_protocol.digest():
        return (
            f"the pairs were built with another judge protocol ({str(row['protocol'])[:12]}…, this version has "
            f"{judge_protocol.digest()[:12]}…); build them again"
        )
    return ""


def _public_pairs(
    source: DataSource, first: tuple[str, Row], placed: Iterable[tuple[str, Row]], bad: OnBad, found: Found
) -> Iterator[tuple[str, Pair]]:
    """The comparisons of public data in both orders; notes which shapes they have and what is left out."""
    if "responses" in first[1]:
        raise MixfuseError(
            f"{first[0]}: this is a pool row, not a pair; run `mixfuse pairs build {source.path or 'FILE'} --out "
            "pairs.jsonl` and name that file"
        )
    comparisons = preferences.read(placed, bad=bad)
    made = of_comparisons(comparisons.pairs, source="", counts=comparisons.left_out)
    found.notes.append(f"{comparisons.described()}; {len(made)} pairs in both orders, without filters or a dev split")
    if not made:
        raise MixfuseError(f"{source.name}: no pair is left to train on ({comparisons.described()})")
    found.rows += len(made)
    both = _both_orders(made, 0)
    for number, pair in enumerate(zip(both, both, strict=True)):
        yield f"{source.name}: pair {number}", pair


def _is_one_pair(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two rows are one pair in both orders: the verdict that is right in one is wrong in the other."""
    verdicts = {row[side][-1]["content"] for row in (first, second) for side in ("chosen", "rejected")}
    swapped = first["chosen"] == second["rejected"] or not verdicts <= set(judge_protocol.VERDICTS)
    return swapped and bool(first["id"] == second["id"])


def _both_orders(preferences: Iterable[Preference], seed: int) -> Iterator[dict[str, Any]]:
    """Two rows a pair; which order comes first is random, by the seed and the pair."""
    for pair in preferences:
        rng = random.Random(f"{seed}:{pair.key}")  # noqa: S311 - a reproducible choice, not a secret
        nonce = judge_protocol.new_nonce(pair.prompt, pair.better, pair.worse, draw=rng.randbytes)
        orders = [(pair.better, pair.worse, 0), (pair.worse, pair.better, 1)]
        rng.shuffle(orders)
        for first, second, verdict in orders:
            yield {
                "id": pair.id,
                "prompt": judge_protocol.comparison(pair.conversation or pair.prompt, first, second, nonce=nonce),
                "chosen": [{"role": "assistant", "content": judge_protocol.VERDICTS[verdict]}],
                "rejected": [{"role": "assistant", "content": judge_protocol.VERDICTS[1 - verdict]}],
                "protocol": judge_protocol.digest(),
                "source": pair.source,
                "margin": round(pair.margin, 4),
            }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
