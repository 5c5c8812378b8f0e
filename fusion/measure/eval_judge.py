"""Asks a judge about labelled pairs, each in both orders; `judge_report` computes the figures."""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.judge_protocol import asked, new_nonce, probability, shown, turns
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
from mixfuse.fusion.calls.rewards import reward
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, http_client
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.judge_report import JudgeReport, Reading, report
from mixfuse.fusion.measure.marks import Views
from mixfuse.fusion.messages import Message
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
    model: ModelConfig | None = None,
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
        model: The judge's config, where it has one. A reward model (`kind: reward`) is asked once about each answer.

    Raises:
        MixfuseError: There is nothing to judge, the judge cannot be reached, or all its calls failed.
    """
    if all(row.label == "tie" for row in rows):
        raise MixfuseError("no pair is left to judge: none has a label other than a tie")
    slots = asyncio.Semaphore(concurrency)
    failures: list[CallError] = []
    if isinstance(model, Judge) and model.kind == "reward":
        return await _evaluate_rewards(endpoint, model, rows, slots, progress=progress, cache=cache, name=name)
    with progress_bar(progress) as bar:
        task = bar.add_task(f"verdicts of {name}", total=2 * len(rows))
        async with http_client() as client:
            judge = CachedJudge(client, endpoint, cache, slots, model)

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

            calls = [view(order) for order in orders_of(rows)]
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


async def _evaluate_rewards(
    endpoint: Endpoint,
    model: Judge,
    rows: Sequence[Comparison],
    slots: asyncio.Semaphore,
    *,
    progress: bool,
    cache: Cache | None,
    name: str,
) -> JudgeReport:
    """Has a reward model score every answer once; both orders of a pair are the same difference of two scores.

    Raises:
        MixfuseError: The model cannot be reached, or all its calls failed.
    """
    questions = [_asked_of(row) for row in rows]
    keys = [
        [sha256_json([question, text]) for text in (row.first, row.second)]
        for row, question in zip(rows, questions, strict=True)
    ]
    wanted = {
        key: (question, text)
        for row, question, both in zip(rows, questions, keys, strict=True)
        for key, text in zip(both, (row.first, row.second), strict=True)
    }
    failures: list[CallError] = []
    scores: dict[str, float] = {}
    purpose, ledger = replace(_PURPOSE, price=model.price, timeout_s=model.timeout_s), Ledger()
    with progress_bar(progress) as bar:
        task = bar.add_task(f"scores of {name}", total=len(wanted))
        async with http_client() as client:

            async def score(key: str, question: list[Message], text: str) -> None:
                entry = {"reward": f"{endpoint.base_url} {endpoint.model} {model.route}", "answer": key}
                try:
                    async with slots:
                        known = cache.get(entry) if cache else None
                        if known is None:
                            found = await reward(
                                client,
                                endpoint,
                                question,
                                shown(text),
                                route=model.route,
                                purpose=purpose,
                                ledger=ledger,
                                more=model.extra_body,
                            )
                            if cache:
                                cache.put(entry, found)
                        scores[key] = found if known is None else float(known.value)
                except CallError as error:
                    if error.kind == "unreachable":  # the next thousand calls would not reach it either
                        raise
                    failures.append(error)
                finally:
                    bar.advance(task)

            calls = [score(key, *asked) for key, asked in wanted.items()]
            all_or_raise(await fan_out(calls, quorum=len(calls)))
    if not scores:
        raise MixfuseError(f"every call to the judge failed, the last: {failures[-1]}", kind="judge_failed")
    views = []
    for both in keys:
        first, second = (scores.get(key) for key in both)
        p = None if first is None or second is None else probability(first - second)
        views.append(Views(p, None if p is None else 1 - p))
    return report(rows, views, failed_calls=Counter(failure.kind for failure in failures), read="scores")


def _asked_of(row: Comparison) -> list[Message]:
    """The conversation that the answers of a pair answer, made harmless as for any judge."""
    given, shown_turns = turns(row.conversation or [{"role": "user", "content": row.prompt}], fold=nonce_of(row.prompt))
    return [*([{"role": "system", "content": given}] if given else []), *shown_turns]


def all_cached(revision: str, rows: Sequence[Comparison], cache: Cache) -> bool:
    """Whether a cache holds every verdict of a judge's revision on these rows, so that it need not be served."""
    return all(cache.holds(_cache_key(revision, order, "logprobs")) for order in orders_of(rows))


class CachedJudge:
    """A judge that is asked through a cache.

    Args:
        client: Shared by all calls.
        endpoint: The judge.
        cache: Verdicts that are known already.
        slots: Limits the calls in flight.
        model: The judge's config, where it has one.

    Attributes:
        read: What verdicts are read from: log-probabilities until the endpoint turns out to give none.
    """

    def __init__(
        self,
        client: Client,
        endpoint: Endpoint,
        cache: Cache | None,
        slots: asyncio.Semaphore,
        model: ModelConfig | None = None,
    ) -> None:
        self._client, self._endpoint, self._cache, self._slots = client, endpoint, cache, slots
        self._model = model
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
        return await ask(JudgeEndpoint(self._client, self._endpoint, _PURPOSE, Ledger(), self._model), order)


def _cache_key(judge: str, order: OrderedPair, read: Reading) -> dict[str, Any]:
    parameters = LOGPROB_PARAMETERS if read == "logprobs" else WRITTEN_PARAMETERS
    return {"judge": judge, "messages": order.messages(), "parameters": parameters}


def orders_of(rows: Sequence[Comparison]) -> Iterator[OrderedPair]:
    """Both orders of every pair, side by side; they share a nonce, so that a prefix cache serves both."""
    for row in rows:
        nonce = nonce_of(row.prompt, row.first, row.second)
        question = row.prompt if row.conversation is None else asked(row.conversation, fold=nonce)
        yield OrderedPair(question, row.first, row.second, nonce)
        yield OrderedPair(question, row.second, row.first, nonce)


def nonce_of(*texts: str) -> str:
    """The same nonce in every run, so that a run can be repeated; the answers were written before it existed."""
    seed = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
    return new_nonce(*texts, draw=random.Random(seed).randbytes)  # noqa: S311 - guards a measurement, not a service
