"""A round's combiner: fitted to the traces of all rounds, and held against the one that serves.

Both are replayed on a frozen set of marked answers, which feedback never reaches, and on live traces. What counts is a
right answer less what it cost, at the value that the target puts on a right answer (`combiner.gain.worth_of`): a
combiner that is as often right for less money is better, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.app.combine import PoolSource, fit, read_prices
from mixfuse.app.loop_config import Combining
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner, load, weigh
from mixfuse.fusion.combiner.asking import policy_for
from mixfuse.fusion.combiner.evidence import Question, read_pool
from mixfuse.fusion.combiner.gain import worth_of
from mixfuse.fusion.measure.combiner_replay import ask, expected_calibration_error, is_complete
from mixfuse.fusion.measure.statistics import Difference, difference


class Replayed(NamedTuple):
    """What one combiner does on some questions.

    Attributes:
        values: Of each question: 1 for a right answer, less its cost in right answers.
        marks: 1 for a right answer.
        costs: In the combiner's prices.
        confidences: In the answers.
    """

    values: list[float]
    marks: list[float]
    costs: list[float]
    confidences: list[float]


def fit_round(config: Combining, traces: Sequence[Path], out: Path) -> dict[str, Any]:
    """Fits the round's combiner; returns its figures, or `nothing` and why there is none.

    Args:
        config: What it is fitted with.
        traces: The traces of all rounds.
        out: The combiner's file.
    """
    prices = read_prices((), config.prices)
    try:
        return fit(PoolSource([*traces, *config.data], config.agreement, prices, price_file=config.prices), out)
    except MixfuseError as error:
        return {"nothing": str(error)}


def compare(config: Combining, new: Path) -> dict[str, Any]:
    """Replays the new combiner and the serving one on the frozen set.

    Args:
        config: Names the set, the serving one's file and the target.
        new: The new one's file.

    Returns:
        The paired difference of the values, and each one's figures; or `nothing` and why.

    Raises:
        MixfuseError: A file cannot be read.
    """
    made = load(new)
    serving = load(config.file) if config.file.exists() else None
    questions = read_pool(config.frozen, made.agreement)[0]
    members = set(made.members) | set(serving.members if serving else ())
    usable = [question for question in questions if is_complete(members, question)]
    if len(usable) < config.min_questions:
        return {
            "nothing": f"{len(usable)} questions have marked answers of every member; {config.min_questions} are needed"
        }
    before = _best_alone(made, usable, config.target) if serving is None else _replay(serving, usable, config.target)
    results = {"new": _replay(made, usable, config.target), "serving": before}
    gap = difference([question.group for question in usable], results["new"].values, results["serving"].values)
    return {
        "n": len(usable),
        "serving": serving.revision if serving else None,
        "difference": gap.to_json(),
        **{f"{name}_{key}": value for name, result in results.items() for key, value in _figures(result).items()},
    }


def shadow(config: Combining, new: Path, traces: Path) -> dict[str, Any]:
    """Weighs the answers of live traces by the new combiner and by the serving one; nobody is asked anything.

    A trace holds the answers of those who were asked, so it says who would be believed, not who would be asked.

    Args:
        config: Names the serving one's file.
        new: The new one's file.
        traces: The round's traces, as they are exported.

    Returns:
        How many traces there are, on how many the two return different answers, and, where both returned answers are
        marked, the paired difference of the marks; or `nothing` and why.
    """
    if not config.file.exists():
        return {"nothing": "no combiner serves yet"}
    made, serving = load(new), load(config.file)
    questions = read_pool([traces], made.agreement)[0]
    marks: list[tuple[str, float, float]] = []
    differ = 0
    for question in questions:
        leaders = [
            question.answers[
                weigh(one, question.answers, domain=question.domain, comparisons=question.comparisons).leader
            ]
            for one in (made, serving)
        ]
        differ += leaders[0].key != leaders[1].key
        if all(leader.right is not None for leader in leaders):
            marks.append((question.group, float(bool(leaders[0].right)), float(bool(leaders[1].right))))
    found: dict[str, Any] = {"n": len(questions), "differ": differ, "marked": len(marks)}
    if len(marks) >= config.min_fresh:
        keys, ours, theirs = zip(*marks, strict=True)
        found["difference"] = difference(keys, ours, theirs).to_json()
    return found


class Decision(NamedTuple):
    """The decision on a round's combiner.

    Attributes:
        promote: Whether it shall serve.
        reason: The reason, in one sentence.
    """

    promote: bool
    reason: str


def decide(frozen: dict[str, Any], live: dict[str, Any], config: Combining) -> Decision:
    """Decides from the frozen set and from live traces; the latter, marked by users, can only count against it."""
    if "nothing" in frozen:
        return Decision(False, f"the frozen set decides nothing: {frozen['nothing']}")
    gap = Difference(**frozen["difference"])
    result = f"right answers less their cost, on the frozen set: {gap}"
    if gap.low <= config.margin or gap.p > config.alpha:
        return Decision(False, f"not shown to be better: {result}")
    if frozen["new_ece"] > frozen["serving_ece"] + config.most_ece:
        return Decision(
            False, f"its confidence is off by {frozen['new_ece']:.3f}, the serving one's by {frozen['serving_ece']:.3f}"
        )
    if "difference" in live and (on_live := Difference(**live["difference"])).high < 0:
        return Decision(False, f"worse on live traces ({on_live}), although better: {result}")
    return Decision(True, f"better: {result}")


def _replay(combiner: Combiner, questions: Sequence[Question], target: float) -> Replayed:
    policy = policy_for(combiner, target)
    if policy is None:
        return _best_alone(combiner, questions, target)
    asked = [ask(combiner, policy, question) for question in questions]
    unit = worth_of(target) * (combiner.members[combiner.best_member].price or 1.0)
    marks = [float(row.right) for row in asked]
    costs = [row.cost for row in asked]
    return Replayed(
        [mark - cost / unit for mark, cost in zip(marks, costs, strict=True)],
        marks,
        costs,
        [row.confidence for row in asked],
    )


def _best_alone(combiner: Combiner, questions: Sequence[Question], target: float) -> Replayed:
    """The best member, asked alone, as sure as it is right on average."""
    best = combiner.members[combiner.best_member]
    own = [[row for row in question.answers if row.member == combiner.best_member] for question in questions]
    marks = [float(bool(rows[0].right)) for rows in own]
    cost = best.price / (worth_of(target) * (best.price or 1.0))
    return Replayed([mark - cost for mark in marks], marks, [best.price] * len(marks), [best.accuracy] * len(marks))


def _figures(result: Replayed) -> dict[str, float]:
    count = len(result.marks)
    return {
        "accuracy": sum(result.marks) / count,
        "cost": sum(result.costs) / count,
        "ece": expected_calibration_error(result.confidences, result.marks),
    }
