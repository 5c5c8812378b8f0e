"""Samples rationales from a judge and pairs a right one with a wrong one: training data for a judge that explains.

The judge writes several rationales for each order of each labelled pair. The chosen one has a right verdict, the
rejected one a wrong verdict (SFR-Judge, arXiv 2409.14664; RISE, arXiv 2502.11689). A pair gives rows only if both
orders have a right and a wrong one. The judge may be the policy that will be trained, served as a role, or a stronger
model.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, call, http_client
from mixfuse.fusion.measure.comparisons import Comparison

PURPOSE = Purpose("verdict", "judge")


async def sample(
    endpoint: Endpoint,
    comparisons: Sequence[Comparison],
    *,
    samples: int = 4,
    temperature: float = 1.0,
    max_tokens: int = 256,
    concurrency: int = 8,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Samples rationales and pairs them.

    Args:
        endpoint: The judge.
        comparisons: Labelled pairs; human ties are left out.
        samples: Rationales for each order of each pair.
        temperature: Of the sampling.
        max_tokens: Of one rationale; a longer one is cut off before its verdict.
        concurrency: Calls in flight at once.
        seed: Of the choice among several right or wrong rationales.

    Returns:
        Rows of a pairs file, two neighbouring rows for each pair; and counts: `pairs`, `kept`, `rationales`, `unread`
        and `right`.

    Raises:
        MixfuseError: A call failed, or no pair has right and wrong rationales in both orders.
    """
    decided = [pair for pair in comparisons if pair.label != "tie"]
    slots, rng = asyncio.Semaphore(concurrency), random.Random(seed)  # noqa: S311 - a reproducible choice, no secret
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    orders = [(pair, *order) for pair in decided for order in _orders(pair)]

    async def write(client: Client, messages: list[dict[str, str]]) -> str:
        async with slots:
            reply = await call(client, endpoint, messages, parameters, purpose=PURPOSE, ledger=Ledger())
            return reply.text.strip()

    async with http_client() as client:
        calls = [write(client, messages) for _, messages, _ in orders for _ in range(samples)]
        texts = all_or_raise(await fan_out(calls, quorum=len(calls)))
    counts = {"pairs": len(decided), "kept": 0, "rationales": len(texts), "unread": 0, "right": 0}
    halves: list[dict[str, Any] | None] = []
    for number, (pair, messages, right) in enumerate(orders):
        rationales = texts[number * samples : (number + 1) * samples]
        read = [judge_protocol.read_explained(text) for text in rationales]
        good = [text for text, verdict in zip(rationales, read, strict=True) if verdict == right]
        bad = [text for text, verdict in zip(rationales, read, strict=True) if verdict not in (right, None)]
        counts["unread"] += read.count(None)
        counts["right"] += len(good)
        halves.append(_row(pair, messages, rng.choice(good), rng.choice(bad)) if good and bad else None)
    rows: list[dict[str, Any]] = []
    for forward, backward in zip(halves[::2], halves[1::2], strict=True):
        if forward and backward:
            rows += [forward, backward]
            counts["kept"] += 1
    if not rows:
        raise MixfuseError(
            f"no pair has right and wrong rationales in both orders ({counts['right']} of {len(texts)} right, "
            f"{counts['unread']} without a verdict); take more samples, or a judge that follows the instruction"
        )
    return rows, counts


def _orders(pair: Comparison) -> list[tuple[list[dict[str, str]], str]]:
    """The comparison's messages in both orders, each with its right verdict."""
    nonce = judge_protocol.new_nonce(pair.prompt, pair.first, pair.second)
    right = judge_protocol.VERDICTS if pair.label == "first" else judge_protocol.VERDICTS[::-1]
    orders = ((pair.first, pair.second), (pair.second, pair.first))
    prompts = [judge_protocol.comparison(pair.prompt, *answers, nonce=nonce) for answers in orders]
    return [(judge_protocol.explained(messages), verdict) for messages, verdict in zip(prompts, right, strict=True)]


def _row(pair: Comparison, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "id": sha256_json(pair.prompt)[:16],
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "protocol": judge_protocol.digest(),
        "source": "rationale",
    }
