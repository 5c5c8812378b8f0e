"""Whether a round's judge is promoted: the rule, and the lines that `mixfuse loop` prints."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mixfuse.app.loop_config import Promote
from mixfuse.fusion.measure.statistics import Difference


class Decision(NamedTuple):
    """The decision on a round's judge.

    Attributes:
        promote: Whether the judge shall serve.
        reason: The reason, in one sentence.
    """

    promote: bool
    reason: str


def decide(frozen: Mapping[str, Any], fresh: Mapping[str, Any] | None, promote: Promote) -> Decision:
    """Decides from two evaluations, each of the new judge and the serving judge on the same pairs.

    Args:
        frozen: The evaluation on the frozen set: its `prompts` and the paired `difference`.
        fresh: The evaluation on fresh traces; None if there are too few.
        promote: What the new judge must achieve.
    """
    difference = Difference(**frozen["difference"])
    result = f"{promote.measure.replace('_', ' ')} on the frozen set {difference}"
    if frozen["prompts"] < promote.min_prompts:
        return Decision(False, f"the frozen set has {frozen['prompts']} prompts, {promote.min_prompts} are needed")
    if difference.low <= promote.margin:
        verdict = "worse" if difference.high < 0 else "not better by enough"
        return Decision(False, f"{verdict}: {result}; the lower end must be above {promote.margin:g}")
    if difference.p > promote.alpha:
        return Decision(False, f"not significant at {promote.alpha:g}: {result}")
    if fresh is not None and (on_fresh := Difference(**fresh["difference"])).high < 0:
        return Decision(False, f"worse on fresh traces ({on_fresh}), although better: {result}")
    return Decision(True, f"better: {result}")


def summary_lines(decision: Mapping[str, Any]) -> list[str]:
    """The lines that `mixfuse loop` prints for a round's `decision.json`."""
    verdict = "promoted" if decision["promoted"] else "kept the serving judge"
    printed = [f"round {decision['round']}: {verdict}; {decision['reason']}"]
    for name in ("frozen", "fresh"):
        evaluation = decision.get(name) or {}
        if "difference" in evaluation:
            new, serving = evaluation["new"]["value"], evaluation["serving"]["value"]
            difference = Difference(**evaluation["difference"])
            printed.append(f"{name}: {new:.3f} against {serving:.3f} on {evaluation['n']} pairs, {difference}")
        elif "nothing" in evaluation:
            printed.append(f"{name}: {evaluation['nothing']}")
    if (combiner := decision.get("combiner")) is not None:
        said = f"promoted {combiner['revision']}" if combiner["promoted"] else "kept the serving one"
        printed.append(f"combiner: {said}; {combiner['reason']}")
    return printed
