"""best_of: the members answer in parallel, the judge compares the answers, and the best one is returned unchanged.

Equal answers are one answer with several votes; the votes and the judge's log-odds decide together. An answer may be a
tool call; the judge then compares the calls. While late members are still waited for, the judge already compares the
answers in hand, so that its time is not added to the wait.
"""

from mixfuse.fusion.answering.agreement import distinct, votes
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
        return await _select_best(request, judge)


async def select_best(request: FusionRequest) -> str:
    """Returns the best of the candidates in hand.

    Raises:
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    async with PairwiseJudge(request) as judge:
        return await _select_best(request, judge)


async def _select_best(request: FusionRequest, judge: PairwiseJudge) -> str:
    """Returns the best candidate; the judge is not asked about a lone one, or about candidates that all agree.

    If the judge fails, the first candidate in the config's order is returned, unless `on_judge_error` is `fail`.
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
        return await request.select(first, "judge_failed")
    return await request.select(best, "judged")


MODE = Mode(answer=best_of, needs="judge", takes_tools=True, finish=select_best)
