"""What to do with a pool, in words: weigh all answers, use one member, use one for each domain, or mark more first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mixfuse.fusion.measure.combiner_replay import Figures, Marks, clopper_pearson
from mixfuse.fusion.measure.statistics import Difference, difference

WORTH = 0.02
"""The gain that is worth finding: below it the prices of several members are hardly ever paid back."""
_SURE, _FOUND = 1.96, 0.84  # normal quantiles: 5 % two-sided, and a gain that is there is found four times in five
_FEW = 10
_FOLDS = 5
# Answers of a domain that the accuracies in all of them count for.
_SHRINK = 20


@dataclass(frozen=True)
class ByDomain:
    """One member for each domain.

    Attributes:
        marks: Of that member's answers, chosen on other questions.
        members: Domain → the member, chosen on all questions.
    """

    marks: list[float]
    members: dict[str, str]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.marks) / len(self.marks)


@dataclass(frozen=True)
class Kept:
    """Members that are enough.

    Attributes:
        members: Each of them adds something.
        gain: Weighing their answers minus the best member.
        from_all: Weighing their answers minus weighing all.
    """

    members: list[str]
    gain: Difference
    from_all: Difference

    def to_json(self) -> dict[str, Any]:
        """One JSON object, keys as the attributes."""
        return {"members": self.members, "gain": self.gain.to_json(), "from_all": self.from_all.to_json()}


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
        choice: `fuse`, `domains` (one member for each domain), `member` (the best one), or `unknown`.
        words: The same in words, with its evidence.
        domains: Domain → its member, for `domains`.
        enough: For `unknown`, about how many marked questions would decide.
    """

    choice: Literal["fuse", "domains", "member", "unknown"]
    words: str
    domains: dict[str, str]
    enough: int | None = None


def decide(figures: Figures, marks: Marks, trusted: Sequence[float], by_domain: ByDomain | None) -> Verdict:
    """Recommends the simplest choice that the marks allow.

    Args:
        figures: With the curve.
        marks: Question by question.
        trusted: The marks of weighed answers, also where a combiner returns the best member's instead.
        by_domain: What choosing by domain gives.
    """
    best = figures.best_member
    if len(marks.members) == 1:
        return Verdict("member", f"Use {best}: it is the only member, so there is nothing to weigh.", {})
    gap = difference(marks.keys, trusted, marks.best)
    if gap.low > 0:
        names = ", ".join(marks.members)
        words = f"Fuse these: {names}. Weighing their answers is right more often than {best}: {_said(gap)}."
        return Verdict("fuse", words + _cheaper(figures), {})
    chosen = None if by_domain is None else difference(marks.keys, by_domain.marks, marks.best)
    if by_domain is not None and chosen is not None and chosen.low > 0:
        return Verdict("domains", _domains(figures, by_domain, chosen), by_domain.members)
    if _ruled_out(gap, len(marks.keys)):
        words = f"Use {best}: weighing the answers is not shown to be right more often ({_said(gap)})"
        return Verdict("member", f"{words}, and a gain of more than {WORTH:.0%} is ruled out.", {})
    enough = needed(gap, trusted, marks.best)
    words = (
        f"Not enough is known: on {len(marks.keys)} questions that are marked throughout, weighing the answers differs "
        f"from {best} by {_said(gap)}. About {enough} such questions would decide. Until then use {best}."
    )
    return Verdict("unknown", words, {}, enough)


def narrowed(verdict: Verdict, kept: Kept, everyone: Sequence[str], figures: Figures) -> Verdict:
    """The verdict to fuse, where some members are not needed."""
    others = [name for name in everyone if name not in kept.members]
    words = (
        f"Fuse these: {', '.join(kept.members)}. Weighing their answers is right more often than "
        f"{figures.best_member}: {_said(kept.gain)}. The others add nothing ({', '.join(others)}): without them it "
        f"differs by {_said(kept.from_all)} from weighing all.{_cheaper(figures)}"
    )
    return replace(verdict, words=words)


def needed(gap: Difference, ours: Sequence[float], theirs: Sequence[float]) -> int:
    """How many marked questions show a gain four times in five, from how often the two differ (Connor, 1987).

    The gain is the one that was seen, where it is more than a quarter of `WORTH` and at most `WORTH`; else `WORTH`.
    """
    n = len(ours)
    gain = gap.value if WORTH / 4 < gap.value <= WORTH else WORTH
    differ = sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / n
    if gap.better + gap.worse < _FEW:  # by luck they may hardly have differed yet
        differ = max(differ, clopper_pearson(gap.better + gap.worse, n).high / 2)
    differ = max(differ, gain)
    count = ((_SURE * math.sqrt(differ) + _FOUND * math.sqrt(differ - gain**2)) / gain) ** 2
    return max(100 * math.ceil(count / 100), 100 * math.ceil((n + 1) / 100))


def best_by_domain(marks: Marks) -> ByDomain | None:
    """Chooses a member for each domain on other questions; None where no question has a domain."""
    domains = [domain or "" for domain in marks.domains]
    if not any(domains):
        return None
    table = np.array(list(marks.members.values())).T  # (Q, M)
    names, of_row = np.unique(domains, return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(table)) % _FOLDS
    result = np.zeros(len(table))
    for number in range(_FOLDS):
        others = fold != number
        if not others.any():  # one question
            others = ~others
        overall = table[others].mean(0)
        for place in range(len(names)):
            mine = np.flatnonzero((of_row == place) & (fold == number))
            if len(mine):
                result[mine] = table[mine, _leader(table[others & (of_row == place)], overall)]
    overall, members = table.mean(0), list(marks.members)
    return ByDomain(
        result.tolist(),
        {str(name): members[_leader(table[of_row == place], overall)] for place, name in enumerate(names) if name},
    )


def _leader(
    rows: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
    overall: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> int:
    """The member that is right most often in a domain; one with few questions leans on what it does in all of them."""
    return int(np.argmax((rows.sum(0) + _SHRINK * overall) / (len(rows) + _SHRINK)))


def _cheaper(figures: Figures) -> str:
    """What asking one after another saves, in a sentence; empty where it saves nothing."""
    cheap = [
        (point.cost_ratio, point.target)
        for point in figures.curve
        if point.cost_ratio is not None and point.accuracy >= figures.best_member_accuracy
    ]
    if not cheap or min(cheap)[0] >= 0.995:
        return ""
    ratio, target = min(cheap)
    return (
        f" All members, asked one after another with a target of {target:g}, are right as often as "
        f"{figures.best_member} at {ratio:.2f} of its cost."
    )


def _domains(figures: Figures, by_domain: ByDomain, gap: Difference) -> str:
    by_member: dict[str, list[str]] = {}
    for domain, member in by_domain.members.items():
        if member != figures.best_member:
            by_member.setdefault(member, []).append(domain)
    named = "; ".join(f"{member} for {', '.join(domains)}" for member, domains in by_member.items())
    return (
        f"Use {named}; else {figures.best_member}. That is right more often than {figures.best_member} alone: "
        f"{_said(gap)}. Weighing is not shown to do more."
    )


def _said(gap: Difference) -> str:
    return " ".join(str(gap).split())


def _ruled_out(gap: Difference, n: int) -> bool:
    """Whether a gain of more than `WORTH` is unlikely; the bootstrap cannot tell where the two hardly differ."""
    if gap.better + gap.worse < _FEW:
        return clopper_pearson(gap.better, n).high <= WORTH
    return gap.high <= WORTH
