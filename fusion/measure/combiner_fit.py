"""A combiner fitted to marked answers, with policies and with figures that the fit has not seen the answers of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.domains import reader_of
from mixfuse.fusion.combiner.evidence import Question, members_of, subset
from mixfuse.fusion.combiner.fit import LEAST_MARKED, Fitted, Options, combiner_of, fit_weights, scores_by_fold
from mixfuse.fusion.combiner.policy import TARGETS, policies
from mixfuse.fusion.combiner.table import probabilities
from mixfuse.fusion.config import Agreement
from mixfuse.fusion.measure.combiner_replay import CurvePoint, Figures, Marks, complete, is_complete, marks
from mixfuse.fusion.measure.combiner_verdict import ByDomain, Verdict, best_by_domain, decide

_SEVERAL, _HARDLY = 10, 0.05


@dataclass(frozen=True)
class Choices:
    """What a combiner does on complete questions, beside other ways to choose an answer.

    Attributes:
        combiner: Without figures.
        marks: Of what it returns.
        trusted: The marks of the weighed answers, also where the combiner returns the best member's instead.
        figures: Of the marks.
        by_domain: What choosing one member for each domain gives; None where no question has a domain.
        verdict: What to do.
        limits: What the marks cannot show.
    """

    combiner: Combiner
    marks: Marks
    trusted: list[float]
    figures: Figures
    by_domain: ByDomain | None
    verdict: Verdict
    limits: list[str]

    def to_json(self) -> dict[str, Any]:
        """The figures as one JSON object, with `best_by_domain`, the verdict in words and the limits."""
        return {
            **self.figures.to_json(),
            "best_by_domain": None if self.by_domain is None else self.by_domain.accuracy,
            "verdict": self.verdict.words,
            "limits": self.limits,
        }


@dataclass(frozen=True)
class CrossValidated(Choices):
    """The same of a combiner just fitted, by weights that have not seen the questions.

    Attributes:
        strength: Of the penalty.
        read: What reading domains from the questions' words is worth, as `reader_of` says; empty without any.
    """

    strength: float
    read: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As `Choices.to_json`, with `domain_reader`."""
        return {**super().to_json(), "domain_reader": self.read or None}


def fit_combiner(
    questions: Sequence[Question],
    agreement: Agreement,
    prices: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Combiner:
    """Fits weights and policies, and works out what they are worth on answers they were not fitted to.

    Args:
        questions: Marked; unmarked ones are counted and left out.
        agreement: What makes two answers equal.
        prices: Member → dollars an answer; 1 for every member where there are none.
        seed: Of the folds.
        progress: Is told what is being worked out.

    Raises:
        MixfuseError: Too few are marked.
    """
    validated = cross_validate(questions, agreement, prices, seed=seed, progress=progress)
    return validated.combiner.model_copy(update={"figures": validated.to_json()})


def cross_validate(
    questions: Sequence[Question],
    agreement: Agreement,
    prices: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> CrossValidated:
    """As `fit_combiner`, with the marks that the figures come from."""
    if joined := next((name for name in members_of(questions) if "+" in name), None):
        raise MixfuseError(f"member {joined!r}: a combiner joins names with '+', so no name may hold one")
    options = Options(dict(prices or {}), {}, seed=seed)
    progress(f"weights of {len(members_of(questions))} members from {len(questions)} questions")
    fitted = fit_weights(questions, options, progress)
    combiner = combiner_of(fitted, questions, agreement, options)
    marked = _marked(questions)
    progress("domains, as the questions' words tell them")
    reader, read = reader_of(fitted, marked)
    progress("whom to ask next, for each target")
    combiner = combiner.model_copy(update={"policies": policies(fitted, combiner), "reader": reader})
    usable = complete(combiner.members, marked)
    rows = np.array([row for row, question in enumerate(marked) if is_complete(combiner.members, question)])
    seen = marks(combiner, usable)
    trusted = np.nan_to_num(fitted.weighed[rows]).tolist()
    seen = replace(
        seen, weighed=seen.best if combiner.fallback else trusted, confidence=confidences(fitted, combiner, rows)
    )
    curve = [
        CurvePoint(policy.target, policy.accuracy, policy.cost_ratio, policy.asked, None)
        for policy in combiner.policies
    ]
    figures = seen.figures(combiner.fallback, curve)
    by_domain = best_by_domain(seen)
    return CrossValidated(
        combiner,
        seen,
        trusted,
        figures,
        by_domain,
        decide(figures, seen, trusted, by_domain),
        limits(questions, list(combiner.members)),
        fitted.strength,
        read,
    )


def refitted(
    validated: CrossValidated, questions: Sequence[Question], members: Sequence[str], *, seed: int = 0
) -> list[float] | None:
    """The marks of weighed answers in a smaller pool, on the questions of `validated.marks`.

    Args:
        validated: Of all members.
        questions: It was fitted to.
        members: Of the smaller pool.
        seed: Of the folds, as there.

    Returns:
        None where too few questions are marked.
    """
    everyone = validated.combiner.members
    parts, wanted = [], []
    for question in _marked(questions):
        if part := _marked(subset([question], members)):
            parts += part
            wanted.append(is_complete(everyone, question))
    if len({part.group for part in parts}) < LEAST_MARKED:
        return None
    fitted = fit_weights(parts, Options({}, {}, strengths=(validated.strength,), seed=seed))
    result: list[float] = np.nan_to_num(fitted.weighed[np.array(wanted)]).tolist()
    return result


def confidences(fitted: Fitted, combiner: Combiner, rows: NDArray[np.int64]) -> list[float]:
    """The confidence in each returned answer, by weights that have not seen the question."""
    share = probabilities(scores_by_fold(fitted.table, fitted.fold, fitted.held_out)[rows])[:, :-1]
    lead = share.argmax(1)
    if combiner.fallback:  # the best member's class is returned
        lead = fitted.table.share[rows, fitted.best].argmax(1)
    return [combiner.calibration[-1](float(value)) for value in share[np.arange(len(rows)), lead]]


def limits(questions: Sequence[Question], members: Sequence[str]) -> list[str]:
    """What the marks cannot show, in sentences."""
    marked = _marked(questions)
    partly = [
        {answer.right for answer in question.answers} - {None}
        for question in marked
        if {answer.member for answer in question.answers if answer.right is not None} != set(members)
        or any(answer.right is None for answer in question.answers)
    ]
    sentences = []
    if len(marked) < len(questions):
        sentences.append(f"{len(questions) - len(marked)} of {len(questions)} questions have no mark and are left out.")
    for kind, other, looks in (("bad", True, "worse"), ("good", False, "better")):
        if len(partly) >= _SEVERAL and sum(other in marks for marks in partly) < _HARDLY * len(partly):
            sentences.append(
                f"{len(partly)} questions are marked in part, nearly all of them with {kind} answers only. Feedback "
                f"that comes only for {kind} answers makes members look {looks} than they are, those most that are "
                "asked most."
            )
            break
    else:
        if partly:
            sentences.append(
                f"{len(partly)} questions are marked in part. They help to fit the weights; the figures leave them out."
            )
    if any(value < 1 for question in questions for value in question.propensities.values()):
        sentences.append(
            "Some members were asked by chance. Accuracies and policies are weighed by the recorded "
            "probabilities; the figures of the whole pool are not."
        )
    if any(
        not question.propensities and len({answer.member for answer in question.answers}) < len(members)
        for question in questions
    ):
        sentences.append(
            "Some questions were answered by some members only, and no probability of asking is recorded. If members "
            "were asked where others were in doubt, their accuracies are too low; nothing can be weighed by that."
        )
    return sentences


def _marked(questions: Sequence[Question]) -> list[Question]:
    """The questions that have a mark, which are those that a fit looks at."""
    return [question for question in questions if any(answer.right is not None for answer in question.answers)]


__all__ = ["TARGETS", "CrossValidated", "cross_validate", "fit_combiner", "refitted"]
