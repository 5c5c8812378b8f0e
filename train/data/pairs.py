"""Preference pairs for the judge, written through the judge protocol.

A pair is one comparison of a better with a worse answer: the prompt is the comparison, `chosen` the verdict for the
better answer, `rejected` the other verdict. Every pair is written in both orders, in two neighbouring rows, so that
training can put them into one batch, where a preference for a position earns nothing. The authors' names serve the
filters and the data card; they are not written to the file.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl, write_jsonl
from mixfuse.train.data.sources import rows
from mixfuse.train.recipe import DataSource

POOL = "pool"
"""The default source of a pair."""


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
    """

    prompt: str
    better: str
    worse: str
    source: str = POOL
    margin: float = 1.0
    models: tuple[str, str] | None = None

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
        pool: JSONL of `{id, prompt, reference, responses: [{model, text, correct}]}`.
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
    return [
        Preference(row["prompt"], good, bad, source, models=(str(author), str(other)) if author and other else None)
        for good, author in sorted(right.items())
        for bad, other in sorted(wrong.items())
        if bad not in right and good.strip() and bad.strip()
    ]


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
    read = read_jsonl(path, required=("id", "prompt", "responses"))
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
    return read


def read_pairs(source: Path | DataSource) -> list[dict[str, Any]]:
    """Reads a pairs file: an even number of rows, the two orders of each pair in neighbouring rows.

    Raises:
        MixfuseError: The data set is missing or empty, was written with another judge protocol, or an order is missing.
    """
    source = source if isinstance(source, DataSource) else DataSource(path=source)
    read = [row for _, row in rows(source, required=("id", "prompt", "chosen", "rejected", "protocol"))]
    other = next((row["protocol"] for row in read if row["protocol"] != judge_protocol.digest()), None)
    if other is not None:
        raise MixfuseError(
            f"{source.name}: the pairs were built with another judge protocol ({str(other)[:12]}…, this version has "
            f"{judge_protocol.digest()[:12]}…); build them again"
        )
    for number in range(0, len(read), 2):
        orders = read[number : number + 2]
        if len(orders) < 2 or not _is_one_pair(*orders):
            raise MixfuseError(
                f"{source.name}: row {number + 1} lacks the other order of its pair; build the pairs again"
            )
    return read


def _is_one_pair(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two rows are one pair in both orders: the verdict that is right in one is wrong in the other."""
    verdicts = {row[side][-1]["content"] for row in (first, second) for side in ("chosen", "rejected")}
    swapped = first["chosen"] == second["rejected"] or not verdicts <= set(judge_protocol.VERDICTS)
    return swapped and bool(first["id"] == second["id"])


def check_pairs(sources: Sequence[DataSource]) -> None:
    """Reads every pair once and keeps none.

    Raises:
        MixfuseError: The same as `read_pairs`.
    """
    for source in sources:
        read_pairs(source)


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
                "prompt": judge_protocol.comparison(pair.prompt, first, second, nonce=nonce),
                "chosen": [{"role": "assistant", "content": judge_protocol.VERDICTS[verdict]}],
                "rejected": [{"role": "assistant", "content": judge_protocol.VERDICTS[1 - verdict]}],
                "protocol": judge_protocol.digest(),
                "source": pair.source,
                "margin": round(pair.margin, 4),
            }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
