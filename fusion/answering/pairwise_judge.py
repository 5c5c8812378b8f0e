"""The judge of a request: it compares candidates pair by pair, each pair in both orders, a whole round at once.

Up to four candidates all meet. Of more, knock-out rounds leave four, which then all meet: n candidates make n + 2
pairs, and of candidates with equal votes one that the judge prefers to every other one still wins.

A candidate that stands for several equal answers has as many votes. Votes and the judge's log-odds are added up, since
the judge alone is often less right than the votes: of real pools, six to eight answers ranked by a judge of .61 to .71
pair accuracy alone lose 13 to 17 points to the majority (benchmarks/best_of_votes.py).
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, Self

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import VERDICTS, combine, new_nonce, shown
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.agreement import distinct, tool_call_text
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.answering.strengths import Comparison, strengths
from mixfuse.fusion.answering.verdicts import (
    JudgeEndpoint,
    NoLogprobsError,
    OrderedPair,
    logprob_verdict,
    rationale_verdict,
    written_verdict,
)
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Endpoint, Purpose
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.messages import as_question

FINALISTS = 4

VOTE = 1.0
"""What one vote weighs, in nats: the log-odds of a member that is right 73 % of the time.

A logit with one weight for all votes, fitted to real pools, gives 0.6 (eight models of unequal strength) to 1.0 (three
alike) for options and 1.8 for numbers, where wrong answers seldom agree.
"""
SUREST = 4.0
"""The log-odds that a calibrated judge's verdict counts at most, in nats: .98."""

Pair = tuple[Candidate, Candidate]


class JudgeError(MixfuseError):
    """The judge could not be asked, or none of its verdicts could be read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="judge_failed")


class View(NamedTuple):
    """The verdict on one order of a pair.

    Attributes:
        p: The probability that the answer shown first is better; None if the reply holds no verdict.
        read: What it was read from.
    """

    p: float | None
    read: Literal["logprobs", "parsed"]


class PairwiseJudge:
    """The judge at work on one request; an async context manager, which ends the calls that were made early.

    Args:
        request: The request; takes the verdicts.
    """

    def __init__(self, request: FusionRequest) -> None:
        self._request = request
        self._begun: set[tuple[int, int]] = set()
        self._early: list[asyncio.Task[tuple[str, list[Verdict]]]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        client_left = kind is not None and issubclass(kind, asyncio.CancelledError)
        for task in self._early:
            task.cancel("cancelled" if client_left else "cancelled_straggler")
        await asyncio.gather(*self._early, return_exceptions=True)

    def judge_early(self, candidates: Sequence[Candidate]) -> None:
        """Begins to judge candidates while others are still waited for, if these will meet in any case."""
        request = self._request
        if request.plan.judge is None or len(request.names) > FINALISTS:
            return
        rivals = distinct(candidates, request.agreement)
        pairs = [pair for pair in combinations(rivals, 2) if _indices(pair) not in self._begun]
        if pairs:
            self._begun.update(map(_indices, pairs))
            self._early.append(asyncio.create_task(self._judge(request.plan.judge, pairs)))

    async def best(self, candidates: Sequence[Candidate], votes: Mapping[int, float]) -> Candidate:
        """Returns the best candidate and adds the verdicts to the request.

        The verdicts of a judge without a calibration count at most one vote: how sure it says it is proves nothing.

        All verdicts of a request come from one adapter revision: early ones of another revision are not used.

        Args:
            candidates: One for each distinct answer.
            votes: Of each, by its index; see `agreement.votes`.

        Raises:
            JudgeError: There is no judge, a call failed (the others are cancelled then), or none of the verdicts
                could be read.
        """
        request, model = self._request, self._request.plan.judge
        if model is None:
            raise JudgeError("no judge is configured")
        rivals = list(candidates)
        try:
            async with request.pool.lease(model, Purpose.of(model, "verdict", "judge"), request.ledger) as endpoint:
                known = await self._early_verdicts(endpoint)
                limit = VOTE if endpoint.calibration is None else SUREST
                while len(rivals) > FINALISTS:
                    verdicts = await judge_pairs(request, model, endpoint, knock_out_pairs(rivals))
                    request.verdicts.extend(verdicts)
                    rivals = survivors(rivals, verdicts, votes, limit)
                pairs = list(combinations(rivals, 2))
                unknown = [pair for pair in pairs if _indices(pair) not in known]
                verdicts = await judge_pairs(request, model, endpoint, unknown)
        except CallError as failure:
            raise JudgeError(str(failure)) from failure
        known |= {(verdict.first, verdict.second): verdict for verdict in verdicts}
        final = [known[_indices(pair)] for pair in pairs]
        request.verdicts.extend(final)
        if all(verdict.parse_failures == len(VERDICTS) for verdict in request.verdicts):
            request.verdicts.clear()
            raise JudgeError("none of the judge's replies names a verdict")
        return ranking(final, rivals, votes, limit)[0]

    async def _early_verdicts(self, endpoint: Endpoint) -> dict[tuple[int, int], Verdict]:
        """Returns the verdicts begun early that the model at this endpoint gave, by pair."""
        known: dict[tuple[int, int], Verdict] = {}
        for task in self._early:
            model_name, verdicts = await task
            if model_name == endpoint.model:
                known |= {(verdict.first, verdict.second): verdict for verdict in verdicts}
        return known

    async def _judge(self, model: ModelConfig, pairs: Sequence[Pair]) -> tuple[str, list[Verdict]]:
        """Returns (the judge's model name at its endpoint, its verdicts on the pairs)."""
        request = self._request
        async with request.pool.lease(model, Purpose.of(model, "verdict", "judge"), request.ledger) as endpoint:
            return endpoint.model, await judge_pairs(request, model, endpoint, pairs)


def _indices(pair: Pair) -> tuple[int, int]:
    return pair[0].index, pair[1].index


def knock_out_pairs(rivals: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Returns the pairs of a knock-out round: as many as leave half of the rivals, or `FINALISTS`.

    If not all are paired, the first in candidate order go through; that order settles ties, too.
    """
    pairs = len(rivals) - max(FINALISTS, (len(rivals) + 1) // 2)
    meeting = rivals[len(rivals) - 2 * pairs :]
    return list(zip(meeting[::2], meeting[1::2], strict=True))


def survivors(
    rivals: Sequence[Candidate],
    verdicts: Sequence[Verdict],
    votes: Mapping[int, float] | None = None,
    limit: float = SUREST,
) -> list[Candidate]:
    """Returns the rivals left after a knock-out round: of each pair the one for which votes and verdict together speak.

    Args:
        rivals: Those who met, and those who go through.
        verdicts: One a pair.
        votes: Of each, by its index; see `agreement.votes`. One each without it.
        limit: The log-odds that a verdict counts at most, in nats.

    Returns:
        In the order of `rivals`; where neither has more, the first of a pair goes through.
    """
    votes = votes or {}

    def loser(verdict: Verdict) -> int:
        lead = VOTE * (votes.get(verdict.first, 1) - votes.get(verdict.second, 1)) + log_odds(verdict.score, limit)
        return verdict.first if lead < 0 else verdict.second

    lost = {loser(verdict) for verdict in verdicts}
    return [rival for rival in rivals if rival.index not in lost]


def ranking(
    verdicts: Sequence[Verdict],
    candidates: Sequence[Candidate],
    votes: Mapping[int, float] | None = None,
    limit: float = SUREST,
) -> list[Candidate]:
    """Sorts candidates, best first.

    By votes plus the strengths that the verdicts come to; where that is equal, and where all have as many votes, by
    pairs won, then by mean score, then by candidate order.

    Args:
        verdicts: On pairs of them.
        candidates: In candidate order.
        votes: Of each, by its index; see `agreement.votes`. One each without it.
        limit: The log-odds that a verdict counts at most, in nats.
    """
    wins = {candidate.index: 0 for candidate in candidates}
    scores: dict[int, list[float]] = {candidate.index: [] for candidate in candidates}
    for verdict in verdicts:
        if verdict.winner != "tie":
            wins[verdict.first if verdict.winner == "first" else verdict.second] += 1
        scores[verdict.first].append(verdict.score)
        scores[verdict.second].append(1.0 - verdict.score)
    evidence = _evidence(verdicts, [candidate.index for candidate in candidates], votes or {}, limit)

    def place(candidate: Candidate) -> tuple[float, int, float, int]:
        own = scores[candidate.index]
        mean = sum(own) / len(own) if own else 0.0
        return -evidence[candidate.index], -wins[candidate.index], -mean, candidate.index

    return sorted(candidates, key=place)


def log_odds(score: float, limit: float = SUREST) -> float:
    """Returns a verdict's log-odds that the first is better, in nats, no further from 0 than `limit`."""
    if score in (0.0, 1.0):
        return limit if score else -limit
    return min(limit, max(-limit, math.log(score) - math.log1p(-score)))


def _evidence(
    verdicts: Sequence[Verdict], indices: Sequence[int], votes: Mapping[int, float], limit: float
) -> dict[int, float]:
    """Returns what votes and verdicts together weigh, by index, in nats; 0 for all where all have as many votes."""
    own = [votes.get(index, 1) for index in indices]
    if len(set(own)) == 1:
        return dict.fromkeys(indices, 0.0)
    places = {index: place for place, index in enumerate(indices)}
    comparisons = [
        Comparison("judge", places[verdict.first], places[verdict.second], log_odds(verdict.score, limit))
        for verdict in verdicts
    ]
    judged = strengths([[place] for place in places.values()], comparisons)
    # Rounded: sums that differ only in their last bits are ties.
    return {
        index: round(VOTE * count + strength, 9) for index, count, strength in zip(indices, own, judged, strict=True)
    }


async def judge_pairs(
    request: FusionRequest, model: ModelConfig, endpoint: Endpoint, pairs: Sequence[Pair]
) -> list[Verdict]:
    """Has pairs judged in both orders, all at once.

    Args:
        request: The request that the candidates answer.
        model: The judge's config.
        endpoint: Where the judge is reached.
        pairs: The pairs.

    Raises:
        CallError: A call failed; the others are cancelled then.
    """
    if not pairs:
        return []
    question, max_chars = as_question(request.plan.messages), request.plan.settings.max_candidate_chars
    texts = {candidate.index: shown(_as_text(candidate), max_chars) for pair in pairs for candidate in pair}
    # One for all: the judge's engine then finds the question, and each answer shown first, in its prefix cache.
    nonce = new_nonce(question, *texts.values())
    judge = JudgeEndpoint(request.pool.client, endpoint, Purpose.of(model, "verdict", "judge"), request.ledger)
    orders = [
        _view(request, model, judge, OrderedPair(question, texts[a.index], texts[b.index], nonce, max_chars))
        for pair in pairs
        for a, b in (pair, pair[::-1])
    ]
    views = all_or_raise(await fan_out(orders, quorum=len(orders)))
    verdicts: list[Verdict] = []
    for (first, second), forward, backward in zip(pairs, views[::2], views[1::2], strict=True):
        outcome = combine(forward.p, backward.p, endpoint.calibration)
        read: Literal["logprobs", "parsed"] = "parsed" if "parsed" in (forward.read, backward.read) else "logprobs"
        verdicts.append(Verdict(first=first.index, second=second.index, read=read, **outcome._asdict()))
    return verdicts


async def _view(request: FusionRequest, model: ModelConfig, judge: JudgeEndpoint, pair: OrderedPair) -> View:
    """Judges one order of a pair, in the way that the config names or the endpoint allows.

    Raises:
        CallError: The call failed.
    """
    verdict_form = model.verdicts if isinstance(model, Judge) else "auto"
    without_logprobs = request.pool.without_logprobs
    address = (judge.endpoint.base_url, judge.endpoint.model)
    if verdict_form == "logprobs" or (verdict_form == "auto" and address not in without_logprobs):
        try:
            return View(await logprob_verdict(judge, pair), "logprobs")
        except NoLogprobsError:
            if verdict_form == "logprobs":
                raise
            without_logprobs.add(address)
    write = rationale_verdict if verdict_form == "rationale" else written_verdict
    return View(await write(judge, pair), "parsed")


def _as_text(candidate: Candidate) -> str:
    """Returns a candidate as the judge reads it: its text and its tool calls."""
    calls = [f"calls the tool {tool_call_text(call)}" for call in candidate.tool_calls or ()]
    return "\n".join([candidate.text, *calls] if candidate.text else calls)
