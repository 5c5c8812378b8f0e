"""Has a judge, typically a stronger one behind any OpenAI-compatible endpoint, say which of two answers is better.

Every pair is asked in both orders. What was said is kept as it comes, so that a second run, or one that goes on after
an interruption, asks only what is missing.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import Outcome, combine, digest, new_nonce
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.fusion.answering.verdicts import (
    JudgeEndpoint,
    NoLogprobsError,
    OrderedPair,
    logprob_verdict,
    written_verdict,
)
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import Pool, all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Endpoint, Purpose
from mixfuse.fusion.config import ModelConfig
from mixfuse.fusion.store.cache import Cache


class Question(NamedTuple):
    """Two answers to a prompt."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Labels:
    """What the judge said.

    Attributes:
        outcomes: Of each pair, both orders together; None where a call failed.
        asked: Calls made; the others were known.
        failed: Calls that failed, by type; a further run makes them again.
        cost: Dollars, by the config's prices.
    """

    outcomes: list[Outcome | None]
    asked: int
    failed: dict[str, int]
    cost: float


async def label(
    model: ModelConfig, questions: Sequence[Question], *, cache: Path, concurrency: int = 8, progress: bool = True
) -> Labels:
    """Asks a judge about pairs, each in both orders.

    Args:
        model: The judge, with `base_url` and `model`.
        questions: The pairs.
        cache: The file of what was said before, see `mixfuse.fusion.store.cache`; added to.
        concurrency: Calls under way at once.
        progress: Show a bar on stderr.

    Raises:
        MixfuseError: The judge cannot be reached, all calls failed, or the cache cannot be written.
    """
    ledger, purpose = Ledger(), Purpose.of(model, "verdict", "judge")
    free, failures = asyncio.Semaphore(concurrency), Counter[str]()
    asked = 0
    written = False  # whether the endpoint gives no log-probabilities, so that verdicts have to be written out

    async def one(endpoint: Endpoint, question: Question) -> tuple[bool, float | None]:
        nonlocal asked, written
        key = _key(model, question)
        if known := said.get(key):
            bar.advance(shown)
            return True, known.value
        async with free:
            asked += 1
            judge = JudgeEndpoint(pool.client, endpoint, purpose, ledger)
            pair = OrderedPair(*question, nonce=new_nonce(*question))
            try:
                p = None
                if not written:
                    try:
                        p = await logprob_verdict(judge, pair)
                    except NoLogprobsError:
                        written = True
                if written:
                    p = await written_verdict(judge, pair)
            except CallError as error:
                if error.kind == "unreachable":  # nor will the next thousand calls reach it
                    raise
                failures[error.kind] += 1
                return False, None
            finally:
                bar.advance(shown)
        said.put(key, p)
        return True, p

    with Cache(cache) as said, progress_bar(progress) as bar:
        shown = bar.add_task("verdicts", total=2 * len(questions))
        async with Pool(None) as pool, pool.lease(model, purpose, ledger) as endpoint:
            orders = [one(endpoint, order) for asked_ in questions for order in (asked_, _swapped(asked_))]
            answers = all_or_raise(await fan_out(orders, quorum=len(orders))) if orders else []
    if failures and failures.total() == asked:
        raise MixfuseError(f"every call to {model.model} failed: {dict(failures)}", kind="judge_failed")
    outcomes = [
        combine(forward, backward) if there and also else None
        for (there, forward), (also, backward) in zip(answers[::2], answers[1::2], strict=True)
    ]
    return Labels(outcomes, asked, dict(failures), sum(line.cost for line in ledger.calls))


def _swapped(question: Question) -> Question:
    return Question(question.prompt, question.second, question.first)


def _key(model: ModelConfig, question: Question) -> dict[str, Any]:
    return {"judge": f"{model.base_url} {model.model}", "protocol": digest(), "texts": list(question)}
