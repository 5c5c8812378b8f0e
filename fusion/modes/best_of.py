"""best_of: members answer in parallel, the judge compares, the winner's answer is returned verbatim.

An answer may be a call of tools: the judge compares what would be called. While the grace for
slow members lasts, the answers in hand are compared already, so that the judge's time is not added to it.
"""

from mixfuse.fusion.answering.agreement import distinct
from mixfuse.fusion.answering.pairwise_judge import Court, JudgeError
from mixfuse.fusion.answering.request import Run


async def best_of(run: Run) -> str:
    """Answers a request in mode `best_of`.

    Raises:
        TooFewAnswersError: The quorum was not met.
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    async with Court(run) as court:
        await run.answers(court.hear)
        return await choose(run, court)


async def choose(run: Run, court: Court | None = None) -> str:
    """Returns the best of the candidates in hand.

    A lone one is returned as it is; where all say the same the judge is not asked; where the judge fails it
    is the first in the config's order, unless that shall be an error.

    Raises:
        JudgeError: The judge failed, and `on_judge_error` is `fail`.
    """
    first = run.candidates[0]
    if len(run.candidates) == 1:
        return await run.give(first, "lone_survivor")
    rivals = distinct(run.candidates, run.agreement)
    if len(rivals) == 1:
        return await run.give(first, "agreement")
    try:
        best = await (court or Court(run)).best(rivals)
    except JudgeError as error:
        if run.plan.settings.on_judge_error == "fail":
            raise
        run.error = str(error)
        return await run.give(first, "judge_failed")
    return await run.give(best, "judged")
