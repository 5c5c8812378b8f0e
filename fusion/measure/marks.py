"""A judge's marks on labelled pairs, and two judges compared by them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mixfuse.contracts.calibration import credit
from mixfuse.contracts.judge_protocol import Calibration, Outcome, combine
from mixfuse.fusion.measure.comparisons import Comparison
from mixfuse.fusion.measure.statistics import Difference, difference

Measure = Literal["both_orders_correct", "first_order", "order_averaged", "consistency"]


class Views(NamedTuple):
    """A judge's two verdicts on a pair: P(the answer shown first is better); None where it could not be read.

    Attributes:
        forward: With the pair's first answer shown first.
        backward: With the pair's second answer shown first.
    """

    forward: float | None
    backward: float | None

    def outcome(self, calibration: Calibration | None = None) -> Outcome:
        """Both orders combined, as at run time."""
        return combine(self.forward, self.backward, calibration)


def marks(
    rows: Sequence[Comparison], views: Sequence[Views], measure: Measure, calibration: Calibration | None = None
) -> list[float]:
    """A judge's mark for each pair that people did not call a tie.

    Args:
        rows: The pairs.
        views: The judge's, in the same order.
        measure: `both_orders_correct`: right whichever answer was shown first; `first_order`: right in the first order,
            a verdict of exactly ½ or none being wrong; `order_averaged`: the mean over both orders is on the right
            side, exactly ½ counting half; `consistency`: both orders name the same answer.
        calibration: The judge's.
    """

    def mark(row: Comparison, view: Views) -> float:
        if measure == "first_order":
            return float(preferred(view.forward) == row.label)
        outcome = view.outcome(calibration)
        if measure == "order_averaged":
            return credit(row.toward_better(outcome.score - 0.5))
        return float(outcome.consistent if measure == "consistency" else outcome.winner == row.label)

    return [mark(row, view) for row, view in zip(rows, views, strict=True)]


def preferred(p: float | None) -> Literal["first", "second"] | None:
    """Which of two answers a verdict prefers, in the order they were shown; None for exactly ½ or no verdict."""
    if p is None or p == 0.5:
        return None
    return "first" if p > 0.5 else "second"


def paired(
    rows: Sequence[Comparison],
    views_a: Sequence[Views],
    views_b: Sequence[Views],
    *,
    measure: Measure = "both_orders_correct",
    calibrations: tuple[Calibration | None, Calibration | None] = (None, None),
) -> Difference:
    """How much better judge A is than judge B on the same pairs; human ties are left out.

    Args:
        rows: The pairs.
        views_a: Judge A's, in the same order.
        views_b: Judge B's.
        measure: What counts as right.
        calibrations: A's and B's.

    Raises:
        ValueError: No pair has a label other than a tie.
    """
    places = [place for place, row in enumerate(rows) if row.label != "tie"]
    decided = [rows[place] for place in places]
    a, b = (
        marks(decided, [views[place] for place in places], measure, calibration)
        for views, calibration in zip((views_a, views_b), calibrations, strict=True)
    )
    return difference([row.prompt for row in decided], a, b)
