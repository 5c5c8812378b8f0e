"""best_of: members answer in parallel, the judge compares, the winner's text is returned verbatim."""

from fusion.judge import JudgeError, judge, ranking
from fusion.run import Run, distinct, question


async def best_of(run: Run) -> str:
    """Answers a request in mode `best_of`.

    Raises:
        TooFewAnswersError: The quorum was not met.
    """
    await run.answers()
    return await choose(run)


async def choose(run: Run) -> str:
    """Returns the best of the candidates in hand.

    A lone one is returned as it is; where all say the same the judge is not asked; where the judge fails it
    is the first in the config's order.
    """
    first = run.candidates[0]
    if len(run.candidates) == 1:
        return await run.give(first, "lone_survivor")
    rivals = distinct(run.candidates) if run.plan.settings.early_agreement else run.candidates
    if len(rivals) == 1:
        return await run.give(first, "agreement")
    asked = question(run.plan.messages)
    try:
        run.verdicts = await judge(run.pool, run.plan.judge, asked, rivals, run.ledger)
    except JudgeError as error:
        run.error = str(error)
        return await run.give(first, "judge_failed")
    return await run.give(ranking(run.verdicts, rivals)[0], "judged")
