"""auto: members are asked one after another until the answer is sure enough, and the likeliest answer is returned.

A fitted combiner weighs who gave which answer and says whom to ask next (`mixfuse combiner fit`, the config's
`combiner`). Without one all members are asked, and votes and judge decide as in best_of. The judge is asked only where
the combiner gives its verdicts weight and they could turn the leading answer round.
"""

import asyncio
import math
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Debate, Verdict, WeighedAnswer, Weighing
from mixfuse.fusion.answering.agreement import candidate_key
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import (
    FINALISTS,
    VOTE,
    JudgeError,
    PairwiseJudge,
    judge_pairs,
    log_odds,
)
from mixfuse.fusion.answering.request import Failure, FusionRequest, TooFewAnswersError
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.calls.failures import CallError, FailureKind
from mixfuse.fusion.calls.ledger import prompt_tokens, tokens
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Endpoint, Purpose, cancelled_as
from mixfuse.fusion.combiner import artefact, evidence, gain
from mixfuse.fusion.combiner.artefact import Combiner, Data, MemberWeights, NoneOfThem
from mixfuse.fusion.combiner.asking import next_member, policy_for
from mixfuse.fusion.combiner.serving import Serving
from mixfuse.fusion.config import Judge, Member, ModelConfig
from mixfuse.fusion.messages import text_of
from mixfuse.fusion.modes.best_of import select_judged
from mixfuse.fusion.modes.debate import revision_prompts, turns
from mixfuse.fusion.modes.merge import synthesize
from mixfuse.fusion.modes.registry import Mode

_JUDGE = "judge"
# What "none of them" weighs where nothing was fitted: fits to real pools with one weight for all votes give 1.2 to 2.0.
_NONE = 1.2
_TYPICAL = 0.73  # the accuracy whose log-odds are `VOTE`
# A verdict that is expected to gain less than this changes nothing that could be measured.
_LEAST_GAIN = 0.002
# Tokens of an answer, for what it will cost.
_USUAL_ANSWER = 256
# Seconds that an answer takes where nothing is known of a member, and at least.
_USUAL_S = 5.0
_QUICKEST_S = 0.01
# Members that are compared by what they gain per second; of more, the most accurate.
_MOST_COMPARED = 8


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
    if request.plan.domain is None:
        request.plan = replace(request.plan, domain=request.combiner.combiner.domain_of(_question(request)))
    async with AsyncExitStack() as leases:
        asking = _Asking(request, request.combiner, leases)
        await asking.ask()
        while await asking.judge():
            pass
    return await asking.answer()


class _Asking:
    """Asking the members of one request, and what is known so far.

    Args:
        request: The request; takes the candidates and verdicts.
        serving: The combiner.
        leases: Keeps the judge's adapter revision to the end of the asking.
    """

    def __init__(self, request: FusionRequest, serving: Serving, leases: AsyncExitStack) -> None:
        self._request, self._serving, self._combiner = request, serving, serving.combiner
        self._policy = policy_for(self._combiner, request.plan.settings.target)
        self._target = self._policy.target if self._policy is not None else request.plan.settings.target
        self._members = {member.name: member for member in request.plan.members}
        # A policy counts members that this request cannot ask as asked, without an answer.
        self._absent = [name for name in self._combiner.members if name not in self._members]
        self.asked: list[str] = []
        self.propensities: dict[str, float] = {}
        self._by_chance: list[str] | None = None
        self.stopped = ""
        self._failures: list[Failure] = []
        self._leases = leases
        self._judge: Endpoint | None = None
        self._met: set[tuple[int, int]] = set()
        self._judge_weight = self._combiner.judges.get(_JUDGE, 0.0) if request.plan.judge is not None else 0.0

    async def ask(self) -> None:
        """Asks members until the policy stops, or the budget or the deadline does."""
        settings = self._request.plan.settings
        explore = random.random() < settings.explore  # noqa: S311 - nobody gains by guessing it
        hurried = settings.prefer == "latency" and not self._combiner.fallback
        width = settings.width or (len(self._members) if hurried else 1)
        await self._ask_at_once(width, explore=explore)
        if self._by_chance is not None:
            self.propensities = {name: settings.explore for name in self._by_chance if name in self.asked}
        answers = len(self._request.candidates)
        if answers < settings.min_responses and self.stopped == "budget":
            got = f"only {', '.join(self.asked)}; answers: {answers} of at least {settings.min_responses}"
            raise CallError("budget", f"the budget allows asking {got}" if self.asked else "the budget allows nobody")
        if answers < settings.min_responses:
            raise TooFewAnswersError(answers, settings.min_responses, self._failures)

    async def _ask_at_once(self, width: int, *, explore: bool) -> None:
        """Asks with up to `width` members under way; those no longer needed are cancelled.

        One that takes longer than `patience_ms` is not counted among them any more.

        Args:
            width: How many are under way at once.
            explore: Where asking would stop, everybody else is asked as well.
        """
        request, clock = self._request, asyncio.get_running_loop().time
        patience_s = request.plan.settings.patience_ms / 1000
        running: dict[asyncio.Task[list[Failure]], str] = {}
        patient_until: dict[asyncio.Task[list[Failure]], float] = {}
        ended: list[str] = []
        enough = False
        outcome: FailureKind = "cancelled_straggler"
        try:
            while True:
                every = self._by_chance is not None
                most = len(self._members) if every else 0 if enough else width
                while not self.stopped and len(patient_until) < most:
                    name = self._next(self.asked, every=every)
                    if name is None:
                        break
                    if not every and not running and await self.judge(instead_of=name):
                        continue
                    if self.stopped:
                        break
                    name = self._affordable(name)
                    if name is None:
                        self.stopped = "budget"
                        break
                    self.asked.append(name)
                    task = asyncio.create_task(request.ask_member(self._members[name]))
                    running[task], patient_until[task] = name, clock() + patience_s
                if (enough or not running) and explore and not every and not self.stopped:
                    self._by_chance = [name for name in self._order() if name not in ended]
                    continue
                if not running or (enough and not every):
                    break
                waits = [until - clock() for until in patient_until.values()]
                left_s = min([request.time_left_s(), *(waits if len(self.asked) < len(self._members) else [])])
                done, _ = await asyncio.wait(running, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
                if not done and request.time_left_s() == 0:
                    self.stopped, outcome = "deadline", "timeout"
                    self._failures += [
                        Failure(name, request.names.index(name), "timeout", "the deadline came first")
                        for name in running.values()
                    ]
                    break
                if not done:
                    patient_until = {task: until for task, until in patient_until.items() if until > clock()}
                for task in done:
                    patient_until.pop(task, None)
                    ended.append(running.pop(task))
                    self._failures += task.result()
                enough = bool(done) and self._enough(ended)
        except asyncio.CancelledError as stop:
            outcome = cancelled_as(stop)
            raise
        finally:
            for task in running:
                task.cancel(outcome)
            if running:
                await asyncio.wait(running)
        if not self.stopped:
            self.stopped = "explore" if self._by_chance is not None else self._why_stopped()

    def _affordable(self, name: str) -> str | None:
        """Returns the member if the budgets allow it; where there is no answer yet, another that they allow, if any."""
        if self._request.affords(self._members[name]):
            return name
        others = [] if self._request.candidates else [other for other in self._order() if other not in self.asked]
        return next((other for other in others if self._request.affords(self._members[other])), None)

    def _next(self, asked: Sequence[str], *, every: bool = False) -> str | None:
        """Returns the member to ask next; None to stop.

        Args:
            asked: Members that have been asked, or have answered or failed.
            every: Nobody is left out.
        """
        left = [name for name in self._order() if name not in asked]
        if not left:
            return None
        if every:
            return left[0]
        short = len(self._request.candidates) < self._request.plan.settings.min_responses
        return self._wanted(left, asked) or (left[0] if short else None)

    def _wanted(self, left: list[str], asked: Sequence[str]) -> str | None:
        """Returns the member of those left that may make the answer surer for its price; None where nobody does."""
        combiner, candidates = self._combiner, self._request.candidates
        if combiner.fallback:
            return None if candidates else left[0]
        confidence = self.weigh(candidates).confidence if candidates else 0.0
        if candidates and confidence >= self._target:
            return None
        if self._request.plan.settings.prefer == "latency":
            return max(left[:_MOST_COMPARED], key=self._gain_per_second)
        if self._policy is None:
            return left[0]
        name = next_member(combiner, self._policy, [*self._absent, *asked], confidence, self._request.plan.domain)
        if name is not None:
            return name if name in left else left[0]
        # Beyond the policy: nobody has answered yet, or only members that the combiner does not know are left.
        return None if candidates and not self._all_known(asked) else left[0]

    def _enough(self, ended: Sequence[str]) -> bool:
        """Whether the members under way are no longer needed."""
        request = self._request
        if request.plan.settings.prefer == "cost" or self._combiner.fallback:
            return self._next(ended) is None
        answers = len(request.candidates)
        return (
            answers >= request.plan.settings.min_responses and self.weigh(request.candidates).confidence >= self._target
        )

    def _gain_per_second(self, name: str) -> float:
        """What a member's answer is expected to gain, over how long its answers take: here of late, or in the data."""
        weights, guard = self._combiner.members.get(name), self._request.pool.guards.get(name)
        seen = guard.latency_s if guard is not None else None
        recorded = weights.latency_ms / 1000 if weights is not None and weights.latency_ms else None
        return self._gain_of(name) / max(_QUICKEST_S, seen or recorded or _USUAL_S)

    def _all_known(self, asked: Sequence[str]) -> bool:
        return all(name in asked or name in self._absent for name in self._combiner.members)

    def _order(self) -> list[str]:
        """Members as they are asked where no policy says otherwise: the best, the most accurate, unknown ones last."""
        combiner = self._combiner

        def rank(name: str) -> tuple[bool, float]:
            known = combiner.members.get(name)
            return name != combiner.best_member, -known.accuracy if known is not None else 0.0

        return sorted(self._members, key=rank)

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

    async def judge(self, *, instead_of: str | None = None) -> bool:
        """Has the judge compare the two leading classes, if its verdict could turn them round and is worth its price.

        Args:
            instead_of: The member that would be asked otherwise: the judge then has to gain more for its price.

        Returns:
            Whether there is a new verdict.

        Raises:
            JudgeError: It failed, and `on_judge_error` is `fail`.
        """
        request, model = self._request, self._request.plan.judge
        if model is None or self._judge_weight <= 0 or self.stopped in ("target", "budget", "deadline"):
            return False
        if request.time_left_s() == 0:
            return False
        weighed = self.weigh(request.candidates) if request.candidates else None
        if weighed is None or len(weighed.classes) < 2 or len(self._met) >= FINALISTS:
            return False
        places = sorted(row.answers[0] for row in weighed.classes[:2])
        pair = request.candidates[places[0]], request.candidates[places[1]]
        if (pair[0].index, pair[1].index) in self._met or not self._pays(weighed, model, pair, instead_of):
            return False
        self._met.add((pair[0].index, pair[1].index))
        try:
            if self._judge is None:
                purpose = Purpose.of(model, "verdict", _JUDGE)
                lease = request.pool.lease(model, purpose, request.ledger)
                self._judge = await self._leases.enter_async_context(lease)
            judged = judge_pairs(request, model, self._judge, [pair])
            request.verdicts += all_or_raise(await fan_out([judged], quorum=1, deadline_s=request.time_left_s()))[0]
        except CallError as error:
            self._judge_weight = 0.0
            if error.kind == "budget":  # it says nothing of the judge
                self.stopped = self.stopped and "budget"
                return False
            if request.time_left_s() == 0:
                self.stopped = "deadline"
            if request.plan.settings.on_judge_error == "fail":
                raise JudgeError(str(error)) from error
            request.error = str(error)
            return False
        return True

    def _pays(
        self, weighed: artefact.Weighing, model: ModelConfig, pair: Sequence[Candidate], instead_of: str | None
    ) -> bool:
        """Whether a verdict gains more than it costs, and more for its price than the member it is asked instead of."""
        request = self._request
        usual = gain.usual_strength([log_odds(verdict.score) for verdict in request.verdicts])
        gained = gain.of_verdict(weighed, self._judge_weight, usual)
        prompt = prompt_tokens(request.plan.messages) + sum(tokens(candidate.text) for candidate in pair)
        if isinstance(model, Judge) and model.kind == "reward":  # each answer is read once, with its question
            price = model.price.cost(prompt + prompt_tokens(request.plan.messages), 0)
        else:
            price = 2 * model.price.cost(prompt, model.max_tokens or 1)
        # By the config's prices: a combiner's may be in any unit. Of the best member that this request can ask.
        unit = self._dollars(self._members[self._order()[0]])
        if gained < _LEAST_GAIN or gained * gain.worth_of(request.plan.settings.target) * unit < price:
            return False
        if instead_of is None:
            return True
        member = self._members[instead_of]
        others = self._gain_of(instead_of)
        return gained * self._dollars(member) > others * price

    def _dollars(self, member: Member) -> float:
        """What an answer of a member costs, as far as it can be known before."""
        return member.samples * member.price.cost(prompt_tokens(self._request.plan.messages), _USUAL_ANSWER)

    def _gain_of(self, name: str) -> float:
        answers, comparisons = _evidence(self._request, self._combiner, self._request.candidates)
        domain = self._request.plan.domain
        return gain.of_member(self._combiner, name, answers, domain=domain, comparisons=comparisons)

    async def answer(self) -> str:
        """Returns the likeliest answer; where it is not sure enough and the config says so, the others have a say.

        Raises:
            MixfuseError: The confidence is below `abstain_below`, and `on_abstain` is `refuse` (`low_confidence`).
        """
        request, settings = self._request, self._request.plan.settings
        weighed = self.weigh(request.candidates)
        request.weighing = self.record(weighed)
        unsure = request.weighing.confidence < settings.target and len(weighed.classes) > 1
        if unsure and self.stopped in ("all_asked", "not_worth_more", "explore"):
            if settings.escalate == "debate" and await self._debated():
                weighed = _weigh(request, self._combiner, request.candidates, verdicts=())
                request.weighing = self.record(weighed)
            elif settings.escalate == "merge" and request.plan.synthesizer is not None:
                places = [place for row in weighed.classes for place in row.answers]
                places.sort(key=lambda place: place != weighed.leader)
                request.candidates = [request.candidates[place] for place in places]
                return await synthesize(request)
        if request.weighing.low_confidence and settings.on_abstain == "refuse":
            raise MixfuseError(
                f"the answer is right with a probability of {request.weighing.confidence:.2f}, below "
                f"{settings.abstain_below} (modes.abstain_below)",
                kind="low_confidence",
            )
        return await request.select(request.candidates[weighed.leader], "weighed")

    async def _debated(self) -> bool:
        """Has the members revise their answers once, if they are different models and the budget allows it."""
        request = self._request
        models = {(row.member.base_url, row.member.model, row.member.role) for row in request.candidates}
        if len(models) < 2 or request.time_left_s() == 0:
            return False
        before = turns(request)
        try:
            await request.revise(revision_prompts(request))
        except CallError:  # the budget does not allow it
            return False
        request.debate = Debate(rounds=[before, turns(request)], stopped="max_rounds")
        return True

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


def _question(request: FusionRequest) -> str:
    """Returns the text of the last message of the user."""
    contents = [message.get("content") for message in request.plan.messages if message.get("role") == "user"]
    return text_of(contents[-1]) if contents else ""


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


def _weigh(
    request: FusionRequest,
    combiner: Combiner,
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict] | None = None,
) -> artefact.Weighing:
    """Weighs candidates, with the verdicts on them: those of the request, unless others are given."""
    answers, comparisons = _evidence(request, combiner, candidates, verdicts)
    return artefact.weigh(combiner, answers, domain=request.plan.domain, comparisons=comparisons)


def _evidence(
    request: FusionRequest,
    combiner: Combiner,
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict] | None = None,
) -> tuple[list[evidence.Answer], list[Comparison]]:
    """Returns candidates and the verdicts on them as a combiner weighs them.

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
        for verdict in (request.verdicts if verdicts is None else verdicts)
        if verdict.first in places and verdict.second in places
    ]
    return answers, comparisons


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
