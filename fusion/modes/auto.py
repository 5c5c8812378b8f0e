"""auto: members are asked one after another until the answer is sure enough, and the likeliest answer is returned.

A fitted combiner weighs who gave which answer and says whom to ask next (`mixfuse combiner fit`, the config's
`combiner`). Without one all members are asked, and votes and judge decide as in best_of. The judge is asked only where
the combiner gives its verdicts weight and they could turn the leading answer round.
"""

import asyncio
import math
import random
from collections.abc import Sequence

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import WeighedAnswer, Weighing
from mixfuse.fusion.answering.agreement import candidate_key
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import (
    FINALISTS,
    SUREST,
    VOTE,
    JudgeError,
    PairwiseJudge,
    judge_pairs,
    log_odds,
)
from mixfuse.fusion.answering.request import Failure, FusionRequest, TooFewAnswersError
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.calls.failures import CallError, FailureKind
from mixfuse.fusion.calls.upstream import Purpose, cancelled_as
from mixfuse.fusion.combiner import artefact, evidence
from mixfuse.fusion.combiner.artefact import Combiner, Data, MemberWeights, NoneOfThem
from mixfuse.fusion.combiner.asking import next_member, policy_for
from mixfuse.fusion.combiner.serving import Serving
from mixfuse.fusion.config import Member
from mixfuse.fusion.modes.best_of import select_judged
from mixfuse.fusion.modes.registry import Mode

_JUDGE = "judge"
# What "none of them" weighs where nothing was fitted: fits to real pools with one weight for all votes give 1.2 to 2.0.
_NONE = 1.2
_TYPICAL = 0.73  # the accuracy whose log-odds are `VOTE`


async def auto(request: FusionRequest) -> str:
    """Answers a request in mode `auto`.

    Raises:
        TooFewAnswersError: Fewer members answered than the quorum.
        CallError: A budget does not allow asking anyone (`budget`).
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
        MixfuseError: The confidence is below `abstain_below`, and `on_abstain` is `refuse` (`low_confidence`).
    """
    if not isinstance(request.combiner, Serving):
        return await _by_votes(request)
    asking = _Asking(request, request.combiner)
    await asking.ask()
    await asking.ask_judge()
    weighed = asking.weigh(request.candidates)
    request.weighing = asking.record(weighed)
    if request.weighing.low_confidence and request.plan.settings.on_abstain == "refuse":
        raise MixfuseError(
            f"the answer is right with a probability of {request.weighing.confidence:.2f}, below "
            f"{request.plan.settings.abstain_below} (modes.abstain_below)",
            kind="low_confidence",
        )
    return await request.select(request.candidates[weighed.leader], "weighed")


class _Asking:
    """Asking the members of one request, and what is known so far.

    Args:
        request: The request; takes the candidates and verdicts.
        serving: The combiner.
    """

    def __init__(self, request: FusionRequest, serving: Serving) -> None:
        self._request, self._serving, self._combiner = request, serving, serving.combiner
        self._policy = policy_for(self._combiner, request.plan.settings.target)
        self._members = {member.name: member for member in request.plan.members}
        # A policy counts members that this request cannot ask as asked, without an answer.
        self._absent = [name for name in self._combiner.members if name not in self._members]
        self.asked: list[str] = []
        self.propensities: dict[str, float] = {}
        self.stopped = ""
        self._failures: list[Failure] = []

    async def ask(self) -> None:
        """Asks members until the policy stops, or the budget or the deadline does."""
        settings = self._request.plan.settings
        if settings.explore and random.random() < settings.explore:  # noqa: S311 - nobody gains by guessing it
            await self._ask_at_once(stop_early=False, width=len(self._members))
            self.stopped = self.stopped if self.stopped in ("budget", "deadline") else "explore"
            self._note_propensities(settings.explore)
        else:
            width = len(self._members) if settings.prefer == "latency" else settings.width
            await self._ask_at_once(stop_early=True, width=width)
        answers = len(self._request.candidates)
        if not answers and self.stopped == "budget":
            raise CallError("budget", "the budget does not allow asking any member")
        if answers < settings.min_responses:
            raise TooFewAnswersError(answers, settings.min_responses, self._failures)

    async def _ask_at_once(self, *, stop_early: bool, width: int) -> None:
        """Asks with up to `width` members under way; those no longer needed are cancelled."""
        running: dict[asyncio.Task[list[Failure]], str] = {}
        ended: list[str] = []
        outcome: FailureKind = "cancelled_straggler"
        try:
            while True:
                while not self.stopped and len(running) < width:
                    name = self._next(self.asked, self._request.candidates, every=not stop_early)
                    if name is None:
                        break
                    if not self._request.affords(self._members[name]):
                        self.stopped = "budget"
                        break
                    self.asked.append(name)
                    running[asyncio.create_task(self._request.ask_member(self._members[name]))] = name
                if not running:
                    break
                done, _ = await asyncio.wait(
                    running, timeout=self._request.time_left_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self.stopped, outcome = "deadline", "timeout"
                    self._failures += [
                        Failure(name, self._request.names.index(name), "timeout", "the deadline came first")
                        for name in running.values()
                    ]
                    break
                for task in done:
                    ended.append(running.pop(task))
                    self._failures += task.result()
                if stop_early and running and self._next(ended, self._request.candidates) is None:
                    break
        except asyncio.CancelledError as stop:
            outcome = cancelled_as(stop)
            raise
        finally:
            for task in running:
                task.cancel(outcome)
            if running:
                await asyncio.wait(running)
        self.stopped = self.stopped or self._why_stopped()

    def _next(self, asked: Sequence[str], candidates: Sequence[Candidate], *, every: bool = False) -> str | None:
        """Returns the member to ask next; None to stop."""
        left = [name for name in self._order() if name not in asked]
        if not left:
            return None
        settings, combiner = self._request.plan.settings, self._combiner
        if every or (len(candidates) < settings.min_responses and asked and self._all_known(asked)):
            return left[0]
        if combiner.fallback:
            return left[0] if not candidates and combiner.best_member not in asked[1:] else None
        confidence = self.weigh(candidates).confidence if candidates else 0.0
        if self._policy is None:
            return left[0] if confidence < settings.target else None
        name = next_member(combiner, self._policy, [*self._absent, *asked], confidence)
        if name is not None:
            return name if name in left else left[0]
        if candidates and (confidence >= self._policy.target or not self._all_known(asked)):
            return left[0] if len(candidates) < settings.min_responses else None
        return left[0]  # nobody has answered yet, or only members that the combiner does not know are left

    def _all_known(self, asked: Sequence[str]) -> bool:
        return all(name in asked or name in self._absent for name in self._combiner.members)

    def _order(self) -> list[str]:
        """Members as they are asked where no policy says otherwise: the most accurate first, unknown ones last."""
        known = self._combiner.members
        return sorted(self._members, key=lambda name: -known[name].accuracy if name in known else 0.0)

    def _why_stopped(self) -> str:
        if not self._request.candidates:
            return "all_asked"
        policy = self._policy
        # The highest target of a fitted combiner may be below the one that the request asks for.
        if (
            policy is not None
            and policy.target >= self._request.plan.settings.target - 1e-9
            and self.weigh(self._request.candidates).confidence >= policy.target
        ):
            return "target"
        return "all_asked" if len(self.asked) == len(self._members) else "not_worth_more"

    def _note_propensities(self, explore: float) -> None:
        """Notes the first member that the policy would not have asked: it, and with it the rest, was by chance."""
        followed: list[str] = []
        while True:
            candidates = [row for row in self._request.candidates if row.member.name in followed]
            name = self._next(followed, candidates)
            if name is None:
                break
            followed.append(name)
        beyond = [name for name in self.asked if name not in followed]
        if beyond:
            self.propensities[beyond[0]] = explore

    async def ask_judge(self) -> None:
        """Has the judge compare the leading classes, as long as a verdict could turn them round.

        Raises:
            JudgeError: It failed, and `on_judge_error` is `fail`.
        """
        request, weight = self._request, self._combiner.judges.get(_JUDGE, 0.0)
        model = request.plan.judge
        if model is None or weight <= 0 or self.stopped in ("target", "budget", "deadline"):
            return
        met: set[tuple[int, int]] = set()
        try:
            async with request.pool.lease(model, Purpose.of(model, "verdict", _JUDGE), request.ledger) as endpoint:
                while len(met) < FINALISTS:
                    classes = self.weigh(request.candidates).classes
                    if len(classes) < 2 or classes[0].score - classes[1].score >= weight * SUREST:
                        return
                    places = sorted((classes[0].answers[0], classes[1].answers[0]))
                    pair = request.candidates[places[0]], request.candidates[places[1]]
                    if (pair[0].index, pair[1].index) in met:
                        return
                    met.add((pair[0].index, pair[1].index))
                    request.verdicts += await judge_pairs(request, model, endpoint, [pair])
        except CallError as error:
            if request.plan.settings.on_judge_error == "fail":
                raise JudgeError(str(error)) from error
            request.error = str(error)

    def weigh(self, candidates: Sequence[Candidate]) -> artefact.Weighing:
        """Weighs some candidates, with the verdicts on them."""
        return _weigh(self._request, self._combiner, candidates)

    def record(self, weighed: artefact.Weighing) -> Weighing:
        """Returns what the trace and the client get."""
        settings = self._request.plan.settings
        confidence = weighed.confidence if self._policy is None else self._policy.calibration(weighed.confidence)
        return _record(
            self._request,
            weighed,
            combiner=self._serving.revision,
            target=settings.target,
            confidence=confidence,
            low_confidence=settings.abstain_below is not None and confidence < settings.abstain_below,
            stopped=self.stopped,
            asked=self.asked,
            propensities=self.propensities,
        )


async def _by_votes(request: FusionRequest) -> str:
    """Asks all members; votes, and the judge where there is one, decide. If the judge fails, votes alone do."""
    combiner = _uniform(request.plan.members)
    async with PairwiseJudge(request) as judge:
        await request.ask_members(on_answer=judge.judge_early)
        leader = request.candidates[_weigh(request, combiner, request.candidates).leader]
        if request.plan.judge is not None:
            text = await select_judged(request, judge, otherwise=leader)
        else:
            text = await request.select(leader, "weighed")
    weighed = _weigh(request, combiner, request.candidates)
    confidence = next(
        row.probability
        for row in weighed.classes
        if any(request.candidates[place].index == request.winner for place in row.answers)
    )
    names = [member.name for member in request.plan.members]
    request.weighing = _record(request, weighed, confidence=confidence, stopped="all_asked", asked=names)
    return text


def _uniform(members: Sequence[Member]) -> Combiner:
    """Returns a combiner by which each member has one vote."""
    return Combiner(
        agreement="exact",
        members={member.name: MemberWeights(weight=VOTE, accuracy=_TYPICAL, price=0.0) for member in members},
        judges={_JUDGE: 1.0},
        none=NoneOfThem(weight=_NONE),
        best_member=members[0].name,
        data=Data(sha256="", questions=0, marked=0, complete=0),
    )


def _weigh(request: FusionRequest, combiner: Combiner, candidates: Sequence[Candidate]) -> artefact.Weighing:
    """Weighs candidates, with the verdicts on them.

    The answers are read as the combiner's data were; without fitted weights, as the request says.
    """
    rule = combiner.agreement if combiner.data.questions else request.agreement
    answers = []
    for candidate in candidates:
        if candidate.tool_calls:
            key = candidate_key(candidate, rule)
            answers.append(evidence.Answer(candidate.member.name, key, length=math.log1p(len(candidate.text))))
        else:
            cut = candidate.finish_reason == "length"
            answers.append(evidence.answer(candidate.member.name, candidate.text, rule, cut=cut))
    places = {candidate.index: place for place, candidate in enumerate(candidates)}
    comparisons = [
        Comparison(_JUDGE, places[verdict.first], places[verdict.second], log_odds(verdict.score))
        for verdict in request.verdicts
        if verdict.first in places and verdict.second in places
    ]
    return artefact.weigh(combiner, answers, domain=request.plan.domain, comparisons=comparisons)


def _record(
    request: FusionRequest,
    weighed: artefact.Weighing,
    *,
    confidence: float,
    stopped: str,
    asked: list[str],
    **more: object,
) -> Weighing:
    classes = [
        WeighedAnswer(
            candidates=[request.candidates[place].index for place in row.answers],
            score=row.score,
            probability=row.probability,
        )
        for row in weighed.classes
    ]
    fields = {"confidence": confidence, "stopped": stopped, "asked": asked, "classes": classes, **more}
    return Weighing.model_validate({"domain": request.plan.domain, **fields})


MODE = Mode(answer=auto, takes_tools=True)
