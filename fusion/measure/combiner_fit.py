"""A combiner fitted to marked answers, with policies and with figures that the fit has not seen the answers of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.combiner.fit import Fitted, Options, combiner_of, fit_weights, scores_by_row
from mixfuse.fusion.combiner.policy import TARGETS, policies
from mixfuse.fusion.combiner.table import Floats, probabilities
from mixfuse.fusion.config import Agreement
from mixfuse.fusion.measure.combiner_replay import CurvePoint, Figures, expected_calibration_error, replay
from mixfuse.fusion.measure.statistics import difference

_SURE = 1.96


def fit_combiner(
    questions: Sequence[Question], agreement: Agreement, prices: Mapping[str, float] | None = None, *, seed: int = 0
) -> Combiner:
    """Fits weights and policies, and works out what they are worth on answers they were not fitted to.

    Args:
        questions: Marked; unmarked ones are counted and left out.
        agreement: What makes two answers equal.
        prices: Member → dollars an answer; 1 for every member where there are none.
        seed: Of the folds.

    Raises:
        MixfuseError: Too few are marked.
    """
    options = Options(dict(prices or {}), {}, seed=seed)
    fitted = fit_weights(questions, options)
    combiner = combiner_of(fitted, questions, agreement, options)
    combiner = combiner.model_copy(update={"policies": policies(fitted, combiner)})
    return combiner.model_copy(update={"figures": _figures(fitted, combiner, questions)})


def _figures(fitted: Fitted, combiner: Combiner, questions: Sequence[Question]) -> dict[str, Any]:
    """The figures of `Figures`, cross-validated, with `best_by_domain` and the verdict in words."""
    marked = [question for question in questions if any(answer.right is not None for answer in question.answers)]
    complete = fitted.table.answered.all(1) & ~np.isnan(fitted.table.mark).any(1)
    rows = np.flatnonzero(complete)
    if not len(rows):
        raise MixfuseError(
            "there is no question with a marked answer of every member, so nothing can be said of the pool; have all "
            "members answer some questions (`pool collect`, or `explore` of the mode auto)"
        )
    seen = replay(combiner.model_copy(update={"policies": []}), [marked[row] for row in rows])
    best = fitted.table.mark[rows, fitted.best]
    weighed = best if combiner.fallback else fitted.weighed[rows]
    lead = probabilities(scores_by_row(fitted.table, fitted.held_out)[rows])[:, :-1].max(1)
    confidence = [combiner.calibration[-1](float(value)) for value in lead]
    keys = [marked[row].id for row in rows]
    figures = replace(
        seen,
        weighed=float(np.nanmean(weighed)),
        difference=difference(keys, np.nan_to_num(weighed).tolist(), best.tolist()),
        ece=expected_calibration_error(confidence, np.nan_to_num(fitted.weighed[rows]).tolist()),
        curve=[
            CurvePoint(policy.target, policy.accuracy, policy.cost_ratio, policy.asked, math.nan)
            for policy in combiner.policies
        ],
    )
    by_domain = _best_by_domain(fitted, rows)
    result = figures.to_json()
    for point in result["curve"]:
        del point["ece"]
    return {**result, "best_by_domain": by_domain, "verdict": verdict(figures, by_domain, len(rows))}


def verdict(figures: Figures, best_by_domain: float | None, marked: int) -> str:
    """What to do, in words."""
    gap = figures.difference
    best = figures.best_member
    if gap.low > 0:
        words = f"Fuse these: weighing is right {gap} more often than {best}."
        cheap = [point for point in figures.curve if point.accuracy >= figures.best_member_accuracy]
        if cheap:
            least = min(cheap, key=lambda point: point.cost_ratio)
            words += (
                f" Asked one after another with a target of {least.target:g}, they are right as often as {best} at "
                f"{least.cost_ratio:.2f} of its cost."
            )
        return words
    if best_by_domain is not None and best_by_domain > figures.best_member_accuracy + 0.01:
        return (
            f"Use the best member of each domain: that is right {best_by_domain:.3f} of the time, {best} alone "
            f"{figures.best_member_accuracy:.3f}. Weighing is not shown to do more."
        )
    half = (gap.high - gap.low) / 2
    expected = 0.02
    enough = math.ceil(marked * (half / expected) ** 2 / 100) * 100
    if half > expected:
        return (
            f"Not enough is known: weighing differs from {best} by {gap} on {marked} marked questions. About {enough} "
            f"would show a gain of {expected:.0%}. Until then use {best}."
        )
    return f"Use {best}: weighing is not shown to be right more often ({gap})."


def _best_by_domain(fitted: Fitted, rows: Any, folds: int = 5) -> float | None:
    """How often the best member of the question's domain is right, chosen on other questions; None without domains."""
    table = fitted.table.rows(rows)
    if not (table.domain >= 0).any():
        return None
    fold = np.random.default_rng(0).permutation(len(table)) % folds
    overall = np.nanmean(table.mark, 0)
    right: Floats = np.zeros(len(table))
    for number in range(folds):
        for domain in np.unique(table.domain):
            inside = table.domain == domain
            others = table.mark[inside & (fold != number)]
            # A domain with few questions leans on what members do in all of them.
            means = (np.nansum(others, 0) + 20 * overall) / (len(others) + 20)
            mine = np.flatnonzero(inside & (fold == number))
            right[mine] = table.mark[mine, int(np.argmax(means))]
    return float(right.mean())


__all__ = ["TARGETS", "fit_combiner", "verdict"]
