"""Rationales sampled from a judge, kept by whether their verdict is right: preference pairs for a judge that explains.

Of each labelled pair, in both orders, the judge writes several; chosen is one whose verdict is right, rejected one
whose verdict is wrong (SFR-Judge, arXiv 2409.14664; RISE, arXiv 2502.11689). A pair gives rows where both orders have
both. Whose rationales these are is the endpoint's affair: the policy that will be trained, served as a role, or a
stronger model.
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
        endpoint: The judge that writes.
        comparisons: Labelled pairs; people's ties are left out.
        samples: Rationales of each order of each pair.
        temperature: Of the sampling.
        max_tokens: Of one rationale; one that runs on has no verdict.
        concurrency: Calls under way at once.
        seed: Of the choice among several right or wrong ones.

    Returns:
        Rows of a pairs file, two neighbouring ones a pair; and counts: `pairs`, `kept`, `rationales`, `unread` and
        `right`.

    Raises:
        MixfuseError: A call failed, or no pair was kept.
    """
    judged = [one for one in comparisons if one.label != "tie"]
    free, rng = asyncio.Semaphore(concurrency), random.Random(seed)  # noqa: S311 - a reproducible choice, no secret
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    orders = [(one, *turned) for one in judged for turned in _orders(one)]

    async def write(client: Client, messages: list[dict[str, str]]) -> str:
        async with free:
            reply = await call(client, endpoint, messages, parameters, purpose=PURPOSE, ledger=Ledger())
            return reply.text.strip()

    async with http_client() as client:
        calls = [write(client, messages) for _, messages, _ in orders for _ in range(samples)]
        texts = all_or_raise(await fan_out(calls, quorum=len(calls)))
    counts = {"pairs": len(judged), "kept": 0, "rationales": len(texts), "unread": 0, "right": 0}
    halves: list[dict[str, Any] | None] = []
    for number, (one, messages, right) in enumerate(orders):
        said = texts[number * samples : (number + 1) * samples]
        read = [judge_protocol.read_explained(text) for text in said]
        good = [text for text, verdict in zip(said, read, strict=True) if verdict == right]
        bad = [text for text, verdict in zip(said, read, strict=True) if verdict not in (right, None)]
        counts["unread"] += read.count(None)
        counts["right"] += len(good)
        halves.append(_row(one, messages, rng.choice(good), rng.choice(bad)) if good and bad else None)
    rows: list[dict[str, Any]] = []
    for one_order, other_order in zip(halves[::2], halves[1::2], strict=True):
        if one_order and other_order:
            rows += [one_order, other_order]
            counts["kept"] += 1
    if not rows:
        raise MixfuseError(
            f"no pair has right and wrong rationales in both orders ({counts['right']} of {len(texts)} right, "
            f"{counts['unread']} without a verdict); take more samples, or a judge that follows the instruction"
        )
    return rows, counts


def _orders(one: Comparison) -> list[tuple[list[dict[str, str]], str]]:
    """The comparison in both orders, and the right verdict of each."""
    nonce = judge_protocol.new_nonce(one.prompt, one.first, one.second)
    right = judge_protocol.VERDICTS if one.label == "first" else judge_protocol.VERDICTS[::-1]
    turned = ((one.first, one.second), (one.second, one.first))
    asked = [judge_protocol.comparison(one.prompt, *answers, nonce=nonce) for answers in turned]
    return [(judge_protocol.explained(messages), verdict) for messages, verdict in zip(asked, right, strict=True)]


def _row(one: Comparison, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "id": sha256_json(one.prompt)[:16],
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "protocol": judge_protocol.digest(),
        "source": "rationale",
    }
