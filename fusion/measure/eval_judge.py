"""Asks a judge about labelled pairs, each in both orders; `judge_report` computes the figures."""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import new_nonce
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.fusion.answering.verdicts import (
    LOGPROB_PARAMETERS,
    WRITTEN_PARAMETERS,
    JudgeEndpoint,
    NoLogprobsError,
    OrderedPair,
    logprob_verdict,
    written_verdict,
)
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, http_client
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.judge_report import JudgeReport, Reading, report
from mixfuse.fusion.measure.marks import Views
from mixfuse.fusion.store.cache import Cache

_PURPOSE = Purpose("verdict", "judge")


async def evaluate(
    endpoint: Endpoint,
    rows: Sequence[Comparison],
    *,
    concurrency: int = 8,
    progress: bool = True,
    cache: Cache | None = None,
    name: str = "the judge",
) -> JudgeReport:
    """Has a judge compare every pair in both orders, human ties as well.

    A judge whose endpoint gives no log-probabilities writes its verdicts; its probabilities are then 0 and 1.

    Args:
        endpoint: The judge, with its calibration where it has one.
        rows: From `comparisons.load`.
        concurrency: Calls in flight at once.
        progress: Show a bar on stderr.
        cache: Open; a verdict in it is not asked for again. Its keys hold the endpoint's revision, or its URL and model
            where it has none.
        name: The judge's name beside the bar.

    Raises:
        MixfuseError: There is nothing to judge, the judge cannot be reached, or all its calls failed.
    """
    if all(row.label == "tie" for row in rows):
        raise MixfuseError("no pair is left to judge: none has a label other than a tie")
    slots = asyncio.Semaphore(concurrency)
    failures: list[CallError] = []
    with progress_bar(progress) as bar:
        task = bar.add_task(f"verdicts of {name}", total=2 * len(rows))
        async with http_client() as client:
            judge = _Judge(client, endpoint, cache, slots)

            async def view(order: OrderedPair) -> float | None:
                try:
                    return await judge.verdict(order)
                except CallError as error:
                    if error.kind == "unreachable":  # the next thousand calls would not reach it either
                        raise
                    failures.append(error)
                    return None
                finally:
                    bar.advance(task)

            calls = [view(order) for order in _orders(rows)]
            views = all_or_raise(await fan_out(calls, quorum=len(calls)))
    if len(failures) == len(calls):
        raise MixfuseError(f"every call to the judge failed, the last: {failures[-1]}", kind="judge_failed")
    return report(
        rows,
        [Views(*both) for both in zip(views[::2], views[1::2], strict=True)],
        failed_calls=Counter(failure.kind for failure in failures),
        calibration=endpoint.calibration,
        read=judge.read,
    )


def all_cached(revision: str, rows: Sequence[Comparison], cache: Cache) -> bool:
    """Whether a cache holds every verdict of a judge's revision on these rows, so that it need not be served."""
    return all(cache.holds(_cache_key(revision, order, "logprobs")) for order in _orders(rows))


class _Judge:
    """A judge that is asked through a cache.

    Args:
        client: Shared by all calls.
        endpoint: The judge.
        cache: Verdicts that are known already.
        slots: Limits the calls in flight.

    Attributes:
        read: What verdicts are read from: log-probabilities until the endpoint turns out to give none.
    """

    def __init__(self, client: Client, endpoint: Endpoint, cache: Cache | None, slots: asyncio.Semaphore) -> None:
        self._client, self._endpoint, self._cache, self._slots = client, endpoint, cache, slots
        self._identity = endpoint.revision or f"{endpoint.base_url} {endpoint.model}"
        self._no_logprobs = {"judge": self._identity, "gives": "log-probabilities"}
        self.read: Reading = "parsed" if cache and cache.get(self._no_logprobs) else "logprobs"

    async def verdict(self, order: OrderedPair) -> float | None:
        """P(the answer shown first is better), from the cache or the endpoint; None where no verdict was read.

        Raises:
            CallError: The call failed.
        """
        async with self._slots:
            read = self.read
            question = _cache_key(self._identity, order, read)
            if cached := self._cache and self._cache.get(question):
                return None if cached.value is None else float(cached.value)
            try:
                p = await self._ask(order, read)
            except NoLogprobsError:
                if self.read == "logprobs" and self._cache:
                    self._cache.put(self._no_logprobs, True)
                self.read = read = "parsed"
                question = _cache_key(self._identity, order, read)
                p = await self._ask(order, read)
        if self._cache:
            self._cache.put(question, p)
        return p

    async def _ask(self, order: OrderedPair, read: Reading) -> float | None:
        ask = logprob_verdict if read == "logprobs" else written_verdict
        return await ask(JudgeEndpoint(self._client, self._endpoint, _PURPOSE, Ledger()), order)


def _cache_key(judge: str, order: OrderedPair, read: Reading) -> dict[str, Any]:
    parameters = LOGPROB_PARAMETERS if read == "logprobs" else WRITTEN_PARAMETERS
    return {"judge": judge, "messages": order.messages(), "parameters": parameters}


def _orders(rows: Sequence[Comparison]) -> Iterator[OrderedPair]:
    """Both orders of every pair, side by side; they share a nonce, so that a prefix cache serves both."""
    for row in rows:
        nonce = _nonce(row)
        yield OrderedPair(row.prompt, row.first, row.second, nonce)
        yield OrderedPair(row.prompt, row.second, row.first, nonce)


def _nonce(row: Comparison) -> str:
    """The same nonce in every run, so that a run can be repeated; the answers were written before it existed."""
    texts = (row.prompt, row.first, row.second)
    seed = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
    return new_nonce(*texts, draw=random.Random(seed).randbytes)  # noqa: S311 - guards a measurement, not a service
