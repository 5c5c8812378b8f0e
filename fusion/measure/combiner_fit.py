"""A combiner fitted to marked answers, with policies and with figures that the fit has not seen the answers of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.evidence import Question, members_of
from mixfuse.fusion.combiner.fit import Fitted, Options, combiner_of, fit_weights, scores_by_fold
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
    if joined := next((name for name in members_of(questions) if "+" in name), None):
        raise MixfuseError(f"member {joined!r}: a combiner joins names with '+', so no name may hold one")
    options = Options(dict(prices or {}), {}, seed=seed)
    fitted = fit_weights(questions, options)
    combiner = combiner_of(fitted, questions, agreement, options)
    combiner = combiner.model_copy(update={"policies": policies(fitted, combiner)})
    return combiner.model_copy(update={"figures": _figures(fitted, combiner, questions)})


def _figures(fitted: Fitted, combiner: Combiner, questions: Sequence[Question]) -> dict[str, Any]:
    """The figures of `Figures`, cross-validated, with `best_by_domain` and the verdict in words."""
    marked = [question for question in questions if any(answer.right is not None for answer in question.answers)]
    rows = complete_rows(fitted)
    if not len(rows):
        raise MixfuseError(
            "no question has a marked answer of every member, so the members cannot be compared; have all members "
            "answer some questions (`pool collect`, or `explore` of the mode auto)"
        )
    seen = replay(combiner.model_copy(update={"policies": []}), [marked[row] for row in rows])
    best = fitted.table.mark[rows, fitted.best]
    weighed = best if combiner.fallback else fitted.weighed[rows]
    confidence = confidences(fitted, combiner, rows)
    keys = [marked[row].id for row in rows]
    figures = replace(
        seen,
        weighed=float(np.nanmean(weighed)),
        difference=difference(keys, np.nan_to_num(weighed).tolist(), best.tolist()),
        ece=expected_calibration_error(confidence, np.nan_to_num(weighed).tolist()),
        curve=[
            CurvePoint(policy.target, policy.accuracy, policy.cost_ratio, policy.asked, None)
            for policy in combiner.policies
        ],
    )
    by_domain = _best_by_domain(fitted, rows)
    return {
        **figures.to_json(),
        "best_by_domain": by_domain,
        "verdict": verdict(figures, by_domain, len(rows)),
        "limits": limits(questions, list(combiner.members)),
    }


def complete_rows(fitted: Fitted) -> NDArray[np.int64]:
    """The rows of the questions in which every member's answer is marked."""
    return np.flatnonzero(fitted.table.answered.all(1) & ~np.isnan(fitted.table.mark).any(1))


def confidences(fitted: Fitted, combiner: Combiner, rows: NDArray[np.int64]) -> list[float]:
    """The confidence in each returned answer, by weights that have not seen the question."""
    share = probabilities(scores_by_fold(fitted.table, fitted.fold, fitted.held_out)[rows])[:, :-1]
    lead = share.argmax(1)
    if combiner.fallback:  # the best member's class is returned
        lead = fitted.table.share[rows, fitted.best].argmax(1)
    return [combiner.calibration[-1](float(value)) for value in share[np.arange(len(rows)), lead]]


def limits(questions: Sequence[Question], members: Sequence[str]) -> list[str]:
    """What the marks cannot show, in sentences."""
    marked = [[answer.right for answer in question.answers] for question in questions]
    marked = [marks for marks in marked if any(mark is not None for mark in marks)]
    partly = [marks for marks in marked if None in marks]
    sentences = []
    if len(marked) < len(questions):
        sentences.append(f"{len(questions) - len(marked)} of {len(questions)} questions have no mark and are left out.")
    if len(partly) >= 10 and sum(True in marks for marks in partly) < 0.05 * len(partly):
        sentences.append(
            f"{len(partly)} questions are marked in part, nearly all of them with bad answers only. Feedback "
            "that comes only for bad answers makes members look worse than they are, and the confidence too low."
        )
    elif partly:
        sentences.append(
            f"{len(partly)} questions are marked in part. They help to fit the weights; the figures leave them out."
        )
    if any(value < 1 for question in questions for value in question.propensities.values()):
        sentences.append(
            "Some members were asked by chance. Accuracies and policies are weighed by the recorded "
            "probabilities; the figures of the whole pool are not."
        )
    elif any(len({answer.member for answer in question.answers}) < len(members) for question in questions):
        sentences.append(
            "Some questions were answered by some members only, and no probability of asking is recorded. If members "
            "were asked where others were in doubt, their accuracies are too low."
        )
    return sentences


def verdict(figures: Figures, best_by_domain: float | None, marked: int) -> str:
    """What to do, in words."""
    gap = figures.difference
    best = figures.best_member
    if gap.low > 0:
        words = f"Fuse these: weighing is right {gap} more often than {best}."
        cheap = [
            (point.cost_ratio, point.target)
            for point in figures.curve
            if point.cost_ratio is not None and point.accuracy >= figures.best_member_accuracy
        ]
        if cheap and min(cheap)[0] < 0.995:
            ratio, target = min(cheap)
            words += (
                f" Asked one after another with a target of {target:g}, they are right as often as {best} at "
                f"{ratio:.2f} of its cost."
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
