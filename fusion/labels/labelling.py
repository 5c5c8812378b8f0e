"""Has a judge, typically a stronger model behind any OpenAI-compatible endpoint, label pairs of answers.

Every pair is judged in both orders. Verdicts are written to a cache as they come, so that a second run, or one that
continues after an interruption, asks only for those that are missing.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import ModelConfig
from mixfuse.fusion.store.cache import Cache, Known


class AnswerPair(NamedTuple):
    """Two answers to a prompt, in the order the judge sees them."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> "AnswerPair":
        """The other order."""
        return AnswerPair(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class Labels:
    """The judge's verdicts.

    Attributes:
        outcomes: For each pair both orders combined; None where a call failed.
        asked: Calls made; the other verdicts were in the cache.
        failed: Calls that failed, by type; another run makes them again.
        cost: Dollars, by the config's prices.
    """

    outcomes: list[Outcome | None]
    asked: int
    failed: dict[str, int]
    cost: float


async def label(
    model: ModelConfig, pairs: Sequence[AnswerPair], *, cache: Path, concurrency: int = 8, progress: bool = True
) -> Labels:
    """Has a judge label pairs, each in both orders.

    Args:
        model: The judge, with `base_url` and `model`.
        pairs: The pairs.
        cache: The file of earlier verdicts, see `mixfuse.fusion.store.cache`; new ones are added.
        concurrency: Calls in flight at once.
        progress: Show a bar on stderr.

    Raises:
        MixfuseError: The judge cannot be reached, all calls failed, or the cache cannot be written.
    """
    purpose = Purpose.of(model, "verdict", "judge")
    ledger, slots, failures = Ledger(), asyncio.Semaphore(concurrency), Counter[str]()
    asked = 0
    with Cache(cache) as verdicts, progress_bar(progress) as bar:
        bar_task = bar.add_task("verdicts", total=2 * len(pairs))
        async with Pool(None) as pool, pool.lease(model, purpose, ledger) as endpoint:
            judge = _Judge(JudgeEndpoint(pool.client, endpoint, purpose, ledger))

            async def judged(pair: AnswerPair) -> Known | None:
                nonlocal asked
                key = {"judge": f"{model.base_url} {model.model}", "protocol": digest(), "texts": list(pair)}
                try:
                    if known := verdicts.get(key):
                        return known
                    async with slots:
                        asked += 1
                        p = await judge.verdict(pair)
                except CallError as error:
                    if error.kind == "unreachable":  # the next thousand calls would not reach it either
                        raise
                    failures[error.kind] += 1
                    return None
                finally:
                    bar.advance(bar_task)
                verdicts.put(key, p)
                return Known(p)

            orders = [judged(order) for pair in pairs for order in (pair, pair.swapped())]
            views = all_or_raise(await fan_out(orders, quorum=len(orders))) if orders else []
    if failures and failures.total() == asked:
        raise MixfuseError(f"every call to {model.model} failed: {dict(failures)}", kind="judge_failed")
    outcomes = [
        combine(forward.value, backward.value) if forward and backward else None
        for forward, backward in zip(views[::2], views[1::2], strict=True)
    ]
    return Labels(outcomes, asked, dict(failures), sum(line.cost for line in ledger.calls))


class _Judge:
    """A judge. Once its endpoint turns out to give no log-probabilities, it writes its verdicts."""

    def __init__(self, endpoint: JudgeEndpoint) -> None:
        self._endpoint = endpoint
        self._gives_logprobs = True

    async def verdict(self, pair: AnswerPair) -> float | None:
        """P(the answer shown first is better); None where no verdict was read.

        Raises:
            CallError: The call failed.
        """
        ordered = OrderedPair(*pair, nonce=new_nonce(*pair))
        if self._gives_logprobs:
            try:
                return await logprob_verdict(self._endpoint, ordered)
            except NoLogprobsError:
                self._gives_logprobs = False
        return await written_verdict(self._endpoint, ordered)
