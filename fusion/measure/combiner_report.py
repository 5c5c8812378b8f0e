"""Whether a pool is worth fusing: the figures of a report on recorded answers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixfuse.fusion.combiner.artefact import Combiner
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.measure import combiner_replay
from mixfuse.fusion.measure.combiner_fit import Choices, CrossValidated, limits, refitted
from mixfuse.fusion.measure.combiner_replay import Bin, Figures, Marks, complete, reliability, with_domains
from mixfuse.fusion.measure.combiner_verdict import Kept, Verdict, best_by_domain, decide, narrowed
from mixfuse.fusion.measure.statistics import Clusters, Difference, Estimate, difference, wilson

Notify = Callable[[str], None]
_AS_GOOD = 0.002  # a smaller pool that loses less is recommended


@dataclass(frozen=True)
class Member:
    """One member of a pool.

    Attributes:
        accuracy: Of its answers.
        price: Of one answer.
        alone: Share of questions that it gets right and no other member does.
        without: Accuracy of weighing the others' answers; None where it could not be worked out.
        worth: Weighing all answers minus weighing the others'; None likewise.
    """

    accuracy: Estimate
    price: float
    alone: float
    without: Estimate | None
    worth: Difference | None


@dataclass(frozen=True)
class Domain:
    """One kind of question.

    Attributes:
        n: Questions.
        member: That is right most often in it, chosen on these very questions.
        accuracy: How often that one is.
        best_member: How often the best member of all domains is.
        majority: Of the answer that most members gave.
        weighed: Of the combiner's.
        oracle: Some member is right.
        difference: `weighed` minus `best_member`.
    """

    n: int
    member: str
    accuracy: float
    best_member: float
    majority: float
    weighed: float
    oracle: float
    difference: Difference


@dataclass(frozen=True)
class Report:
    """The figures of a report.

    Attributes:
        figures: As `combiner fit` prints them.
        weighing: Weighing minus the best member, also where the combiner returns the best member's answers.
        ways: Way to choose an answer → share of right answers. Keys: `best_member`, `best_by_domain` (with domains),
            `majority`, `naive`, `weighed`, `oracle`.
        curve: Accuracy of each point of `figures.curve`, with Wilson's interval.
        reliability: Confidence beside accuracy.
        members: By name.
        domains: By name, the largest first; empty without domains.
        domain_reader: What reading domains from the questions' words is worth; None where it was not worked out.
        refitted: `Member.without` is by weights that were fitted without the member; else by the same weights.
        verdict: What to do.
        kept: The members that are enough, where some are not needed.
        limits: What the marks cannot show.
    """

    figures: Figures
    weighing: Difference
    ways: dict[str, Estimate]
    curve: list[Estimate]
    reliability: list[Bin]
    members: dict[str, Member]
    domains: dict[str, Domain]
    domain_reader: dict[str, float] | None
    refitted: bool
    verdict: Verdict
    kept: Kept | None
    limits: list[str]

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the keys of `combiner fit --json`, and those of the report."""
        figures = self.figures.to_json()
        by_domain = self.ways.get("best_by_domain")
        return {
            **figures,
            "best_by_domain": None if by_domain is None else by_domain.value,
            "domain_reader": self.domain_reader,
            "verdict": self.verdict.words,
            "limits": self.limits,
            "choice": self.verdict.choice,
            "use": self.use,
            "enough": self.verdict.enough,
            "cannot_be_beaten": 1 - self.figures.all_fail.low,
            "weighing": self.weighing.to_json(),
            "ways": {name: estimate.to_json() for name, estimate in self.ways.items()},
            "curve": [
                {**point, "interval": estimate.to_json()}
                for point, estimate in zip(figures["curve"], self.curve, strict=True)
            ],
            "reliability": [asdict(bin_) for bin_ in self.reliability],
            "by_member": {name: _described(member) for name, member in self.members.items()},
            "by_domain": {name: _described(domain) for name, domain in self.domains.items()},
            "refitted": self.refitted,
            "kept": None if self.kept is None else self.kept.to_json(),
        }

    @property
    def use(self) -> list[str] | dict[str, str]:
        """Whom to ask: the members to fuse, the best one, or one for each domain (`*` stands for all others)."""
        if self.verdict.choice == "fuse":
            return self.kept.members if self.kept else list(self.members)
        if self.verdict.choice == "domains":
            return {**self.verdict.domains, "*": self.figures.best_member}
        return [self.figures.best_member]


def of_fit(validated: CrossValidated, questions: Sequence[Question], notify: Notify, *, seed: int = 0) -> Report:
    """The report on answers that a combiner was fitted to, by cross-validation.

    Args:
        validated: The fit.
        questions: It was fitted to.
        notify: Told what is being worked out.
        seed: Of the folds, as in the fit.
    """

    def only(members: Sequence[str]) -> list[float] | None:
        notify(f"fitting to {', '.join(members)}")
        return refitted(validated, questions, members, seed=seed)

    return _report(validated, only, read=validated.read or None, refitted=True)


def of_replay(combiner: Combiner, questions: Sequence[Question], notify: Notify) -> Report:
    """The report on answers that a combiner was not fitted to.

    Raises:
        MixfuseError: No question is marked throughout.
    """
    usable = with_domains(combiner, complete(combiner.members, questions))
    notify("weighing every answer")
    marks = combiner_replay.marks(combiner, usable)
    notify("asking one after another")
    figures = marks.figures(combiner.fallback, combiner_replay.curve(combiner, usable))
    by_domain = best_by_domain(marks)
    played = Choices(
        combiner,
        marks,
        marks.weighed,
        figures,
        by_domain,
        decide(figures, marks, marks.weighed, by_domain),
        limits(questions, list(combiner.members)),
    )

    def only(members: Sequence[str]) -> list[float]:
        notify(f"weighing {', '.join(members)}")
        return combiner_replay.among(combiner, usable, members)

    return _report(played, only, read=None, refitted=False)


def _report(
    seen: Choices,
    only: Callable[[Sequence[str]], list[float] | None],
    *,
    read: dict[str, float] | None,
    refitted: bool,
) -> Report:
    """The report, with what smaller pools give: `only` returns the marks of their weighed answers."""
    marks, by_domain, figures = seen.marks, seen.by_domain, seen.figures
    without: dict[str, list[float] | None] = dict.fromkeys(marks.members)
    if len(without) > 1:
        without = {name: only([other for other in marks.members if other != name]) for name in marks.members}
    ways = {"best_member": marks.best}
    if by_domain is not None:
        ways["best_by_domain"] = by_domain.marks
    ways |= {"majority": marks.majority, "naive": marks.naive, "weighed": marks.weighed, "oracle": marks.some}
    clusters = Clusters(marks.keys)
    members = {}
    for name, own in marks.members.items():
        others = [several for other, several in marks.members.items() if other != name]
        alone = [mark if not any(several[row] for several in others) else 0.0 for row, mark in enumerate(own)]
        left = without[name]
        members[name] = Member(
            clusters.mean(own),
            seen.combiner.members[name].price,
            sum(alone) / len(alone),
            None if left is None else clusters.mean(left),
            None if left is None else difference(marks.keys, seen.trusted, left),
        )
    kept = _kept(seen, members, only) if seen.verdict.choice == "fuse" else None
    return Report(
        figures=figures,
        weighing=difference(marks.keys, seen.trusted, marks.best),
        ways={name: clusters.mean(values) for name, values in ways.items()},
        curve=[_share(point.accuracy, figures.n) for point in figures.curve],
        reliability=reliability(marks.confidence, marks.weighed),
        members=members,
        domains=_domains(marks),
        domain_reader=read,
        refitted=refitted,
        verdict=seen.verdict if kept is None else narrowed(seen.verdict, kept, list(members), figures),
        kept=kept,
        limits=seen.limits,
    )


def _kept(
    seen: Choices, members: dict[str, Member], only: Callable[[Sequence[str]], list[float] | None]
) -> Kept | None:
    """The members that are worth something, where weighing them alone is as good; else None."""
    names = [name for name, member in members.items() if member.worth is None or member.worth.value > 0]
    if not 2 <= len(names) < len(members):
        return None
    alone = only(names)
    if alone is None:
        return None
    keys = seen.marks.keys
    kept = Kept(names, difference(keys, alone, seen.marks.best), difference(keys, alone, seen.trusted))
    return kept if kept.from_all.value > -_AS_GOOD and kept.gain.low > 0 else None


def _domains(marks: Marks) -> dict[str, Domain]:
    rows_of: dict[str, list[int]] = {}
    for row, domain in enumerate(marks.domains):
        if domain:
            rows_of.setdefault(domain, []).append(row)
    return {
        name: _domain(marks, rows) for name, rows in sorted(rows_of.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _domain(marks: Marks, rows: list[int]) -> Domain:
    def mean(values: Sequence[float]) -> float:
        return sum(values[row] for row in rows) / len(rows)

    accuracies = {name: mean(own) for name, own in marks.members.items()}
    member = max(accuracies, key=lambda name: accuracies[name])
    gap = difference(
        [marks.keys[row] for row in rows], [marks.weighed[row] for row in rows], [marks.best[row] for row in rows]
    )
    return Domain(
        len(rows),
        member,
        accuracies[member],
        mean(marks.best),
        mean(marks.majority),
        mean(marks.weighed),
        mean(marks.some),
        gap,
    )


def _share(share: float, n: int) -> Estimate:
    """A share with Wilson's interval."""
    right = min(n, max(0, round(share * n)))
    return Estimate(share, *wilson([True] * right + [False] * (n - right))[1:])


def _described(values: Member | Domain) -> dict[str, Any]:
    return {
        name: value.to_json() if isinstance(value, Estimate | Difference) else value
        for name, value in vars(values).items()
    }
