"""`best_of` on recorded answers: with the verdicts that were recorded, or those of a judge that is asked now."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from mixfuse.contracts.judge_protocol import Calibration, combine, probability
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.agreement import FIRST
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import (
    FINALISTS,
    SUREST,
    VOTE,
    knock_out_pairs,
    log_odds,
    ranking,
    survivors,
)
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.answering.verdicts import OrderedPair
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Endpoint, http_client
from mixfuse.fusion.combiner.artefact import grouped
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.config import Member
from mixfuse.fusion.measure.combiner_replay import is_complete
from mixfuse.fusion.measure.eval_judge import CachedJudge, nonce_of
from mixfuse.fusion.measure.statistics import difference
from mixfuse.fusion.store.cache import Cache

JUDGE = "judge"
_MEMBER = Member(name="recorded", role="recorded")

Judged = Callable[[int, int], Awaitable[float]]
"""Two classes' numbers → the log-odds that the first is better."""


async def judged(
    questions: Sequence[Question],
    endpoint: Endpoint,
    *,
    cache: Cache | None = None,
    concurrency: int = 8,
    progress: bool = True,
) -> list[Question]:
    """Returns the questions with the verdicts of a judge in place of those recorded: those that `best_of` asks for.

    Args:
        questions: With the texts of their answers.
        endpoint: The judge, with its calibration where it has one.
        cache: Open; a verdict in it is not asked for again.
        concurrency: Calls in flight at once.
        progress: Show a bar on stderr.

    Raises:
        CallError: A call failed.
    """
    slots = asyncio.Semaphore(concurrency)
    with progress_bar(progress) as bar:
        task = bar.add_task("questions judged", total=len(questions))
        async with http_client() as client:
            judge = CachedJudge(client, endpoint, cache, slots)

            async def one(question: Question) -> Question:
                classes = list(grouped(question.answers).values())
                found: dict[tuple[int, int], float] = {}

                async def ask(first: int, second: int) -> float:
                    texts = question.answers[classes[first][0]].text, question.answers[classes[second][0]].text
                    nonce = nonce_of(question.prompt, *texts)
                    forward = await judge.verdict(OrderedPair(question.prompt, *texts, nonce))
                    backward = await judge.verdict(OrderedPair(question.prompt, *texts[::-1], nonce))
                    found[first, second] = log_odds(combine(forward, backward, endpoint.calibration).score)
                    return found[first, second]

                await _choose(classes, ask, _limit(endpoint.calibration))
                bar.advance(task)
                comparisons = [
                    Comparison(JUDGE, classes[first][0], classes[second][0], odds)
                    for (first, second), odds in found.items()
                ]
                return replace(question, comparisons=tuple(comparisons))

            return all_or_raise(await fan_out([one(question) for question in questions], quorum=len(questions)))


def figures(questions: Sequence[Question], members: Sequence[str], best: str) -> dict[str, Any] | None:
    """Returns what `best_of` gets on the complete questions that have verdicts or need none; None without verdicts.

    A pair without a verdict is a tie.

    Args:
        questions: Recorded answers.
        members: The pool.
        best: The best member, which it is compared with.
    """
    if not any(row.comparisons for row in questions):
        return None
    # Where all agree there is nothing to judge.
    usable = [
        row for row in questions if is_complete(members, row) and (row.comparisons or len(grouped(row.answers)) == 1)
    ]
    if not usable:
        return None
    chosen = [float(bool(row.answers[_of_recorded(row)].right)) for row in usable]
    alone = [float(any(bool(answer.right) for answer in row.answers if answer.member == best)) for row in usable]
    return {
        "n": len(usable),
        "accuracy": sum(chosen) / len(chosen),
        "best_member_accuracy": sum(alone) / len(alone),
        "difference": difference([row.group for row in usable], chosen, alone).to_json(),
    }


def _of_recorded(question: Question) -> int:
    """The place of the answer that `best_of` returns by the recorded verdicts."""
    classes = list(grouped(question.answers).values())
    of = {place: number for number, places in enumerate(classes) for place in places}
    known: dict[tuple[int, int], list[float]] = {}
    for row in question.comparisons:
        first, second = of[row.first], of[row.second]
        known.setdefault((first, second), []).append(row.log_odds)
        known.setdefault((second, first), []).append(-row.log_odds)

    async def recorded(first: int, second: int) -> float:
        odds = known.get((first, second), [0.0])
        return sum(odds) / len(odds)

    chosen = _choose(classes, recorded, SUREST)
    try:
        chosen.send(None)  # nothing in it waits
    except StopIteration as done:
        return classes[int(done.value)][0]
    raise AssertionError("recorded verdicts are at hand")


async def _choose(classes: Sequence[Sequence[int]], judged_pair: Judged, limit: float) -> int:
    """The class that `best_of` returns, by the gateway's own functions."""
    votes = {number: len(places) + (FIRST if number == 0 else 0.0) for number, places in enumerate(classes)}

    async def verdict(first: Candidate, second: Candidate) -> Verdict:
        p = probability(await judged_pair(first.index, second.index))
        return Verdict(first=first.index, second=second.index, **combine(p, 1 - p)._asdict())

    rivals = [Candidate(number, _MEMBER, "", "stop") for number in range(len(classes))]
    while len(rivals) > FINALISTS:
        rivals = survivors(rivals, [await verdict(*pair) for pair in knock_out_pairs(rivals)], votes, limit)
    final = [await verdict(*pair) for pair in itertools.combinations(rivals, 2)]
    return ranking(final, rivals, votes, limit)[0].index


def _limit(calibration: Calibration | None) -> float:
    return VOTE if calibration is None else SUREST
