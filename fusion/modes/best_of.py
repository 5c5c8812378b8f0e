"""best_of: the members answer in parallel, the judge compares the answers, and the best one is returned unchanged.

Equal answers are one answer with several votes; the votes and the judge's log-odds decide together. An answer may be a
tool call; the judge then compares the calls. While late members are still waited for, the judge already compares the
answers in hand, so that its time is not added to the wait.
"""

from mixfuse.fusion.answering.agreement import distinct, votes
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import JudgeError, PairwiseJudge
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.modes.registry import Mode


async def best_of(request: FusionRequest) -> str:
    """Answers a request in mode `best_of`.

    Raises:
        TooFewAnswersError: The quorum was not met.
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    async with PairwiseJudge(request) as judge:
        await request.ask_members(on_answer=judge.judge_early)
        return await select_judged(request, judge)


async def select_best(request: FusionRequest) -> str:
    """Returns the best of the candidates in hand.

    Raises:
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    async with PairwiseJudge(request) as judge:
        return await select_judged(request, judge)


async def select_judged(request: FusionRequest, judge: PairwiseJudge, *, otherwise: Candidate | None = None) -> str:
    """Returns the best candidate; the judge is not asked about a lone one, or about candidates that all agree.

    Args:
        request: Its candidates are in hand.
        judge: Compares them.
        otherwise: The candidate to return if the judge fails, where others have weighed them; None for the first in the
            config's order.

    Raises:
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    first = request.candidates[0]
    if len(request.candidates) == 1:
        return await request.select(first, "lone_survivor")
    rivals = distinct(request.candidates, request.agreement)
    if len(rivals) == 1:
        return await request.select(first, "agreement")
    try:
        best = await judge.best(rivals, votes(request.candidates, request.agreement))
    except JudgeError as error:
        if request.plan.settings.on_judge_error == "fail":
            raise
        request.error = str(error)
        if otherwise is not None:
            return await request.select(otherwise, "weighed")
        return await request.select(first, "judge_failed")
    return await request.select(best, "judged")


MODE = Mode(answer=best_of, needs="judge", takes_tools=True, finish=select_best)
