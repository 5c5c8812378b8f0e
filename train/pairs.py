"""Preference pairs for the judge, from pool responses, through the judge protocol.

A pair is one comparison of a right with a wrong answer: the prompt is the comparison, `chosen` the verdict for the
right answer, `rejected` the other verdict. Every usable pair is written in both orders, in two neighbouring rows, so
that training can keep them in one batch and a preference for a position earns nothing.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixfuse import judge_protocol
from mixfuse.errors import MixfuseError
from mixfuse.files import read_jsonl, write_jsonl
from train.data import rows
from train.recipe import DataSource


def build(pool: Path, out: Path, *, per_prompt: int = 2, dev_share: float = 0.1, seed: int = 0) -> dict[str, int]:
    """Builds preference pairs from pool responses.

    Args:
        pool: JSONL of `{id, prompt, reference, responses: [{model, text, correct}]}`.
        out: Where the training pairs go; the dev pairs go beside it, as `NAME.dev.jsonl`.
        per_prompt: At most this many pairs of answers a prompt, so that no prompt dominates.
        dev_share: Share of the *prompts* held out for dev; a prompt never stands on both sides.
        seed: Of the choice of pairs, their order and the fence nonces.

    Returns:
        Counts: `prompts`, `usable_prompts`, `train_pairs`, `dev_pairs` (rows; two a pair of answers).

    Raises:
        MixfuseError: A row is not of that shape, or no prompt has both a right and a wrong answer.
    """
    prompts = read_pool(pool)
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    usable = 0
    for row in prompts:
        pairs = list(_pairs(row, per_prompt, seed))
        usable += bool(pairs)
        share = int(hashlib.sha256(f"dev:{row['prompt']}".encode()).hexdigest()[:8], 16) / 16**8
        sides["dev" if share < dev_share else "train"].extend(pairs)
    if not usable:
        raise MixfuseError(f"{pool}: no prompt has both a right and a wrong answer, so there is nothing to prefer")
    if not sides["train"]:
        raise MixfuseError(f"{pool}: every usable prompt fell to dev; collect more prompts or lower --dev-share")
    write_jsonl(out.with_name(f"{out.stem}.dev.jsonl"), sides["dev"])
    write_jsonl(out, sides["train"])
    return {
        "prompts": len(prompts),
        "usable_prompts": usable,
        "train_pairs": len(sides["train"]),
        "dev_pairs": len(sides["dev"]),
    }


def read_pool(path: Path) -> list[dict[str, Any]]:
    """Reads pool responses.

    Raises:
        MixfuseError: The file is missing, empty, or a row has another shape.
    """
    read = read_jsonl(path, required=("id", "prompt", "responses"))
    for row in read:
        responses = row["responses"]
        if not isinstance(row["prompt"], str):
            raise MixfuseError(f"{path}: row {row['id']!r}: prompt must be a string")
        if not isinstance(responses, list) or not all(
            isinstance(r, dict) and isinstance(r.get("text"), str) and isinstance(r.get("correct"), bool)
            for r in responses
        ):
            raise MixfuseError(f"{path}: row {row['id']!r}: responses must be a list of {{model, text, correct}}")
    return read


def read_pairs(source: Path | DataSource) -> list[dict[str, Any]]:
    """Reads what `build` wrote: an even number of rows, the two orders of each pair in neighbouring ones.

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
        if len(orders) < 2 or not _twins(*orders):
            raise MixfuseError(
                f"{source.name}: row {number + 1} stands without the other order of its pair; build them again"
            )
    return read


def _twins(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether they are one pair in both orders: of verdicts, what is right in one is wrong in the other."""
    verdicts = {row[side][-1]["content"] for row in (one, other) for side in ("chosen", "rejected")}
    turned = one["chosen"] == other["rejected"] or not verdicts <= set(judge_protocol.VERDICTS)
    return turned and bool(one["id"] == other["id"])


def check_pairs(sources: Sequence[DataSource]) -> None:
    """Reads every pair once, keeping none.

    Raises:
        MixfuseError: As `read_pairs`.
    """
    for source in sources:
        read_pairs(source)


def _pairs(row: dict[str, Any], per_prompt: int, seed: int) -> Iterator[dict[str, Any]]:
    """Both orders of up to `per_prompt` pairs of distinct right and wrong answers."""
    rng = random.Random(f"{seed}:{row['id']}")  # noqa: S311 - a reproducible choice, not a secret
    right = sorted({response["text"] for response in row["responses"] if response["correct"]})
    wrong = sorted({response["text"] for response in row["responses"] if not response["correct"]} - set(right))
    candidates = [(good, bad) for good in right for bad in wrong if good.strip() and bad.strip()]
    for good, bad in rng.sample(candidates, min(per_prompt, len(candidates))):
        nonce = judge_protocol.new_nonce(row["prompt"], good, bad, draw=rng.randbytes)
        orders = [(good, bad, 0), (bad, good, 1)]
        rng.shuffle(orders)
        for first, second, verdict in orders:
            yield {
                "id": str(row["id"]),
                "prompt": judge_protocol.comparison(row["prompt"], first, second, nonce=nonce),
                "chosen": [{"role": "assistant", "content": judge_protocol.VERDICTS[verdict]}],
                "rejected": [{"role": "assistant", "content": judge_protocol.VERDICTS[1 - verdict]}],
                "protocol": judge_protocol.digest(),
            }
