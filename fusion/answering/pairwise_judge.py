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
from typing import Literal, Self

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import VERDICTS, asked, combine, has_tools, new_nonce, probability, shown
from mixfuse.contracts.judge_protocol import turns as conversation
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.agreement import distinct, tool_call_text
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.fence import own_tokens, refuses_tools
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.answering.strengths import Comparison, strengths
from mixfuse.fusion.answering.verdicts import JudgeEndpoint, OrderedPair, View, judge_all
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.rewards import reward
from mixfuse.fusion.calls.upstream import Endpoint, Purpose
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.messages import as_question, text_of

FINALISTS = 4

VOTE = 1.0
"""What one vote weighs, in nats: the log-odds of a member that is right 73 % of the time.

A logit with one weight for all votes, fitted to real pools, gives 0.6 (eight models of unequal strength) to 1.0 (three
alike) for options and 1.8 for numbers, where wrong answers seldom agree.
"""
SUREST = 4.0
"""The log-odds that a calibrated judge's verdict counts at most, in nats: .98."""

Pair = tuple[Candidate, Candidate]
# Failures that say nothing of the judge: of this request's money, length or client.
_NOT_ITS_FAULT = frozenset({"budget", "context_length", "refused", "cancelled", "cancelled_straggler", "queue_full"})


class JudgeError(MixfuseError):
    """The judge could not be asked, or none of its verdicts could be read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="judge_failed")


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
    if isinstance(model, Judge) and model.kind == "reward":
        return await _by_rewards(request, model, endpoint, pairs)
    messages, max_chars, own = request.plan.messages, request.plan.settings.max_candidate_chars, own_tokens(model)
    texts = {candidate.index: shown(_as_text(candidate), max_chars, own) for pair in pairs for candidate in pair}
    # One for all: the judge's engine then finds the question, and each answer shown first, in its prefix cache.
    nonce = new_nonce(as_question(messages), *texts.values())
    judge = JudgeEndpoint(request.pool.client, endpoint, Purpose.of(model, "verdict", "judge"), request.ledger, model)
    address, without_tools = (endpoint.base_url, endpoint.model), request.pool.without_tools
    lone = len(messages) == 1 and messages[0]["role"] == "user"

    async def judged(fold: str | None) -> list[View]:
        question = asked(text_of(messages[0]["content"]) if lone else messages, fold=fold, own=own)
        orders = [
            OrderedPair(question, texts[a.index], texts[b.index], nonce, max_chars, own)
            for pair in pairs
            for a, b in (pair, pair[::-1])
        ]
        return await judge_all(judge, orders, model.verdicts if isinstance(model, Judge) else "auto")

    tools = has_tools(messages)
    try:
        try:
            views = await judged(nonce if tools and address in without_tools else None)
        except CallError as failure:
            if not tools or address in without_tools or not refuses_tools(failure):
                raise
            views = await judged(nonce)
            without_tools.add(address)
    except CallError as failure:
        if failure.kind not in _NOT_ITS_FAULT:
            endpoint.dialect.problem = f"{failure.kind}: {failure}"
        raise
    read_any = any(view.p is not None for view in views)
    endpoint.dialect.problem = None if read_any else "none of its replies names a verdict"
    verdicts: list[Verdict] = []
    for (first, second), forward, backward in zip(pairs, views[::2], views[1::2], strict=True):
        outcome = combine(forward.p, backward.p, endpoint.calibration)
        read: Literal["logprobs", "parsed"] = "parsed" if "parsed" in (forward.read, backward.read) else "logprobs"
        orders = (forward.p, None if backward.p is None else 1.0 - backward.p)
        verdicts.append(Verdict(first=first.index, second=second.index, read=read, orders=orders, **outcome._asdict()))
    return verdicts


async def _by_rewards(request: FusionRequest, model: Judge, endpoint: Endpoint, pairs: Sequence[Pair]) -> list[Verdict]:
    """Compares pairs by a reward model's scores; each candidate is scored once in a request.

    Raises:
        CallError: A score could not be had; the other calls are cancelled then.
    """
    max_chars, own = request.plan.settings.max_candidate_chars, own_tokens(model)
    candidates = {candidate.index: candidate for pair in pairs for candidate in pair}
    texts = {index: shown(_as_text(candidate), max_chars, own) for index, candidate in candidates.items()}
    given, turns = conversation(request.plan.messages, fold=new_nonce(as_question(request.plan.messages)), own=own)
    question = [*([{"role": "system", "content": given}] if given else []), *turns]
    # By its text as well: a debate changes what a candidate says.
    keys = {index: (endpoint.model, index, text) for index, text in texts.items()}
    new = [index for index, key in keys.items() if key not in request.rewards]
    purpose = Purpose.of(model, "verdict", "judge")
    for index in new:
        request.rewards[keys[index]] = asyncio.get_running_loop().create_future()
    asks = [
        reward(
            request.pool.client,
            endpoint,
            question,
            texts[index],
            route=model.route,
            purpose=purpose,
            ledger=request.ledger,
            more=model.extra_body,
        )
        for index in new
    ]
    scores: Sequence[float | CallError] = [CallError("cancelled", "cancelled before it ended")] * len(new)
    try:
        scores = await fan_out(asks, quorum=len(asks)) if asks else []
    finally:
        for index, score in zip(new, scores, strict=True):
            waiting = request.rewards[keys[index]]
            if isinstance(score, CallError):
                del request.rewards[keys[index]]
                waiting.set_exception(score)
                waiting.exception()  # nobody else may wait for it
            else:
                waiting.set_result(score)
    try:
        all_or_raise(scores)
        known = {index: await asyncio.shield(request.rewards[key]) for index, key in keys.items()}
    except KeyError:
        raise CallError("upstream_error", "the reward model gave another call no score") from None
    except CallError as failure:
        if failure.kind not in _NOT_ITS_FAULT:
            endpoint.dialect.problem = f"{failure.kind}: {failure}"
        raise
    endpoint.dialect.problem = None
    verdicts = []
    for first, second in pairs:
        p = probability(known[first.index] - known[second.index])
        outcome = combine(p, 1.0 - p)
        verdicts.append(Verdict(first=first.index, second=second.index, read="scores", **outcome._asdict()))
    return verdicts


def _as_text(candidate: Candidate) -> str:
    """Returns a candidate as the judge reads it: its text and its tool calls."""
    calls = [f"calls the tool {tool_call_text(call)}" for call in candidate.tool_calls or ()]
    return "\n".join([candidate.text, *calls] if candidate.text else calls)
