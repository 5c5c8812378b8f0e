"""The combiner as it is kept: a strict JSON file of weights, and what a gateway does with it.

A conditional logit over the classes of equal answers and "none of them" (McFadden 1974; stacked generalisation, Wolpert
1992). The score of a class is the sum of what is known of it:

    score(c) = Σ_m s_mc · (weight_m + domain_m + doubt_m + length_m) + Σ_mn s_mc · s_nc · pair_mn + counts(Σ_m s_mc)
               + Σ_j judge_j · strength_jc

with s_mc the share of member m's answers that are in class c. Pairs are there because the errors of models are
correlated: votes weighed by each member's own log-odds lose to the best member in mixed pools. The probability of a
class is its share of exp(score), "none of them" included, made honest by a calibration on questions that the fit has
not seen (Platt 1999).

Plain Python: a gateway weighs some answers of a request in well under a millisecond and needs no numpy for it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mixfuse.contracts.bounded_json import MAX_DEPTH, too_deep
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, sha256_json, write_json
from mixfuse.contracts.judge_protocol import probability as probability_of
from mixfuse.contracts.strict_yaml import Strict, describe
from mixfuse.fusion.answering.strengths import Comparison, strengths
from mixfuse.fusion.combiner.evidence import UNREAD, Answer

VERSION = 1
BINS = 10
"""A policy tells confidences apart in so many steps. Fine steps fit noise: cross-validated on the pool of eight in
benchmarks/combiner.py, the best member's accuracy cost 0.32 of its price with 10 steps, 0.38 with 20, 0.49 with 40."""

LONGEST_Z = 3.0
LONGEST_TEXT = 20_000
"""Characters of a question from which its domain is read."""
LONGEST_NAME = 200
MOST_MEMBERS = 64
"""Each request sums over all pairs of members; with more it would take milliseconds."""
_MOST_NATS, _MOST_NUMBER = 1e3, 1e12
_HUGE = 10**300
_MOST_BYTES = 16 << 20  # that of eight members with all policies has 0.2 MiB
_WORD = re.compile(r"[^\W\d_]{2,30}")


class Length(Strict):
    """What the length of a member's answer says: `slope`·z + `square`·z², z its length in standard deviations."""

    mean: float
    spread: float = Field(gt=0)
    slope: float = 0.0
    square: float = 0.0


class MemberWeights(Strict):
    """What it weighs that a member gave an answer.

    Attributes:
        weight: In every domain.
        domains: Added in a domain.
        doubt: Added where the answer is doubtful (`evidence.read`).
        length: Added for the answer's length.
        accuracy: Share of its marked answers that were right.
        price: Dollars an answer, or any unit in which members are compared.
        latency_ms: Of its answers, the median.
    """

    weight: float
    domains: dict[str, float] = {}
    doubt: float = 0.0
    length: Length | None = None
    accuracy: float = Field(ge=0, le=1)
    price: float = Field(ge=0)
    latency_ms: float | None = Field(default=None, ge=0)


class Pair(Strict):
    """What it weighs that both members gave the same answer, beside what each weighs alone."""

    first: str
    second: str
    weight: float


class NoneOfThem(Strict):
    """The score of "no answer in hand is right".

    Attributes:
        weight: Always.
        domains: Added in a domain.
        asked: Added for the first, second, … member that answered.
    """

    weight: float
    domains: dict[str, float] = {}
    asked: list[float] = []


class Calibrated(Strict):
    """log-odds of being right = `slope` · log-odds of the model + `intercept`."""

    slope: float = Field(default=1.0, ge=0)
    intercept: float = 0.0

    def __call__(self, probability: float) -> float:
        """The honest probability."""
        clipped = min(1 - 1e-6, max(1e-6, probability))
        return probability_of(self.slope * math.log(clipped / (1 - clipped)) + self.intercept)


class DomainReader(Strict):
    """Reads the domain of a question from its words: multinomial logistic regression.

    Attributes:
        domains: Names, in the order of the weights.
        bias: One a domain.
        words: Word → one weight a domain, counted once however often a text has the word.
        sure: Below this probability a domain is not named.
        accuracy: How often the domain that it named was the row's own, on questions it was not fitted to.
        named: The share of those questions to which it named a domain.
    """

    domains: list[str] = Field(min_length=2)
    bias: list[float]
    words: dict[str, list[float]]
    sure: float = Field(ge=0, le=1)
    accuracy: float = Field(ge=0, le=1)
    named: float = Field(ge=0, le=1)

    def __call__(self, text: str) -> str | None:
        """The domain; None where it is in doubt, or no word is known."""
        found = [self.words[word] for word in words_of(text) if word in self.words]
        if not found:
            return None
        scale = 1.0 / math.sqrt(len(found))
        scores = [bias + scale * sum(column) for bias, *column in zip(self.bias, *found, strict=True)]
        shares = _softmax(scores)
        place = max(range(len(shares)), key=shares.__getitem__)
        return self.domains[place] if shares[place] >= self.sure else None


class Policy(Strict):
    """Whom to ask next, for one target.

    Attributes:
        target: The confidence at which asking stops.
        accuracy: What it reached on questions it was not fitted to.
        cost_ratio: What it cost there, over the best member's cost.
        asked: Members a question, on average, there.
        actions: The members asked so far, as `a+b` in the combiner's order of members ("" for none) → for each bin of
            the confidence the member to ask next, or "" to stop.
        first: The question's domain → the member to ask first, where it is another than for other questions.
        calibration: Of the confidence with which it stops.
    """

    target: float = Field(gt=0, le=1)
    accuracy: float
    cost_ratio: float
    asked: float
    actions: dict[str, list[str]]
    first: dict[str, str] = {}
    calibration: Calibrated = Calibrated()


class Data(Strict):
    """What a combiner was fitted to.

    Attributes:
        sha256: Over every question's answers and marks.
        questions: How many.
        marked: Of them, those with a mark.
        complete: Of them, those in which every member was asked.
    """

    sha256: str
    questions: int
    marked: int
    complete: int


class Combiner(Strict):
    """A fitted combiner.

    Attributes:
        version: Of this format.
        agreement: What makes two answers equal.
        members: By name.
        pairs: Of members.
        counts: Added for the second, third, … member that gave the same answer.
        unread: Added for an answer in which nothing could be read.
        judges: What a judge's strength (`strengths`) is multiplied by; by judge.
        none: The score of "none of them".
        calibration: Of the leading class, by the number of members that answered (the last holds for more).
        best_member: Its name.
        fallback: Why the best member is returned whatever the others say; empty where answers are weighed.
        policies: By rising target.
        reader: Reads a question's domain from its words; None where that was not shown to help.
        data: What it was fitted to.
        figures: Cross-validated, as `combiner fit --json` prints them.
    """

    version: Literal[1] = 1
    agreement: Literal["never", "exact", "number", "json", "choice"]
    members: dict[str, MemberWeights] = Field(min_length=1)
    pairs: list[Pair] = []
    counts: list[float] = []
    unread: float = 0.0
    judges: dict[str, float] = {}
    none: NoneOfThem
    calibration: list[Calibrated] = Field(default=[Calibrated()], min_length=1)
    best_member: str
    fallback: str = ""
    policies: list[Policy] = []
    reader: DomainReader | None = None
    data: Data
    figures: dict[str, Any] = {}

    def domain_of(self, text: str) -> str | None:
        """The domain that a question's text is of; None where it is in doubt, or where nothing can read it."""
        return None if self.reader is None else self.reader(text)

    @property
    def revision(self) -> str:
        """12 hex digits over everything that is in it: equal revisions weigh alike."""
        return sha256_json(self.model_dump(mode="json"))[:12]


@dataclass(frozen=True)
class WeighedClass:
    """One class of equal answers.

    Attributes:
        key: What the answers say.
        answers: Their places among the answers that were weighed.
        score: In nats.
        probability: That it is right, before calibration.
    """

    key: str
    answers: tuple[int, ...]
    score: float
    probability: float


@dataclass(frozen=True)
class Weighing:
    """What a combiner makes of some answers.

    Attributes:
        classes: The likeliest first.
        none: The probability that none is right, before calibration.
        confidence: The calibrated probability that the leading class is right.
        leader: The place of the answer to return: of the leading class, by the member that is right most often.
    """

    classes: tuple[WeighedClass, ...]
    none: float
    confidence: float
    leader: int


def load(path: Path) -> Combiner:
    """Reads a combiner.

    Raises:
        MixfuseError: It is no combiner of this version; the message names what does not fit.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe without a writer is waited for without end
        raise MixfuseError(f"{path}: no combiner: a combiner is read from a file, and this is a device or a pipe")
    data = read_json(path, most=_MOST_BYTES)
    if too_deep(data):
        raise MixfuseError(f"{path}: no combiner: it is nested more than {MAX_DEPTH} levels deep")
    if not isinstance(data, dict):
        raise MixfuseError(f"{path}: no combiner: expected a JSON object, found {type(data).__name__}")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MixfuseError(f"{path}: no combiner: it holds half of a surrogate pair, which is no text") from None
    version = data.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise MixfuseError(
            f"{path}: version {str(version)[:80]} of the combiner's format; this program reads {VERSION}"
            if "version" in data
            else f"{path}: no combiner: missing key 'version'"
        )
    try:
        combiner = Combiner.model_validate(data, strict=True)
    except ValidationError as error:
        raise MixfuseError(f"{path}: no combiner: {describe(error, Combiner)[:400]}") from None
    check(combiner, path)
    return combiner


def save(combiner: Combiner, path: Path) -> None:
    """Writes a combiner.

    Raises:
        MixfuseError: Its parts do not fit one another, so that it could not be read again.
    """
    check(combiner, path)
    write_json(path, combiner.model_dump(mode="json"))


def check(combiner: Combiner, source: Path | str) -> None:
    """Sees to it that the parts of a combiner fit one another, and that every number can be reckoned with.

    Raises:
        MixfuseError: They do not.
    """
    known, size = set(combiner.members), len(combiner.members)
    if size > MOST_MEMBERS:
        raise MixfuseError(f"{source}: {size} members, and a combiner has at most {MOST_MEMBERS}")
    if (
        odd := next((name for name in (*known, *_domains(combiner), *combiner.judges) if not is_name(name)), None)
    ) is not None:
        raise MixfuseError(f"{source}: {odd[:80]!r} is no name: up to {LONGEST_NAME} characters that can be printed")
    named = {name for pair in combiner.pairs for name in (pair.first, pair.second)} | {combiner.best_member}
    pairs = Counter(frozenset((pair.first, pair.second)) for pair in combiner.pairs)
    for policy in combiner.policies:
        _check_policy(combiner, policy, source)
        named |= {name for state in policy.actions for name in state.split("+")} - {""}
        named |= {action for actions in policy.actions.values() for action in actions} - {""}
        named |= set(policy.first.values())
    if unknown := sorted(named - known):
        raise MixfuseError(
            f"{source}: no member is called {unknown[0][:80]!r}; its members are {', '.join(sorted(known))}"
        )
    if wrong := next((pair for pair, times in pairs.items() if len(pair) == 1 or times > 1), None):
        raise MixfuseError(f"{source}: the pair {' and '.join(sorted(wrong))} is no pair, or stands twice")
    for name, length, allowed in (
        ("counts", len(combiner.counts), {0, size - 1}),
        ("none.asked", len(combiner.none.asked), {0, size}),
        ("calibration", len(combiner.calibration), {1, size}),
    ):
        if length not in allowed:
            raise MixfuseError(f"{source}: {name} has {length} values; {size} members need {max(allowed)}")
    targets = [policy.target for policy in combiner.policies]
    if any(later <= earlier for earlier, later in pairwise(targets)):
        raise MixfuseError(f"{source}: the targets of the policies do not rise: {', '.join(map(str, targets))[:200]}")
    data = combiner.data
    if not 0 <= data.complete <= data.marked <= data.questions:
        raise MixfuseError(f"{source}: data counts more complete or marked questions than there are")
    if combiner.reader is not None:
        _check_reader(combiner.reader, source)
    for place, value in _numbers(combiner.model_dump(exclude={"figures"})):
        if not math.isfinite(value):
            raise MixfuseError(f"{source}: {place} is not a finite number; fit the combiner again")
        if abs(value) > _most(place):
            raise MixfuseError(f"{source}: {place} is {value:g}, and no fitted one is beyond ±{_most(place):g}")
    for place, value in _numbers(combiner.figures, "figures"):
        if not math.isfinite(value):
            raise MixfuseError(f"{source}: {place} is not a finite number; fit the combiner again")


def is_name(name: str) -> bool:
    """Whether a member, a domain or a judge can be called this: it is shown in terminals, headers and pages."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable()


def _most(place: str) -> float:
    """The largest number that may stand in a place: of nats, unless it is a price, a time or a count."""
    counted = place.endswith((".price", ".latency_ms")) or place.startswith(("data.", "policies["))
    return _MOST_NUMBER if counted and ".calibration." not in place else _MOST_NATS


def _check_policy(combiner: Combiner, policy: Policy, source: Path | str) -> None:
    for state, actions in policy.actions.items():
        members = state.split("+") if state else []
        if members != [name for name in combiner.members if name in members] and set(members) <= set(combiner.members):
            raise MixfuseError(
                f"{source}: the policy for {policy.target} has {state[:200]!r} out of the members' order"
            )
        if again := next((action for action in actions if action in members), None):
            raise MixfuseError(f"{source}: the policy for {policy.target} asks {again!r} again after {state!r}")
        if len(actions) != BINS:
            raise MixfuseError(f"{source}: the policy for {policy.target} has no {BINS} bins after {state[:200]!r}")
    if not all(policy.actions.get("", [""])):
        raise MixfuseError(f"{source}: the policy for {policy.target} asks nobody at the start")


def _check_reader(reader: DomainReader, source: Path | str) -> None:
    count = len(reader.domains)
    if len(set(reader.domains)) != count or len(reader.bias) != count:
        raise MixfuseError(f"{source}: reader: its domains are not all different, or there is not one bias for each")
    if wrong := next((word for word, weights in reader.words.items() if len(weights) != count), None):
        raise MixfuseError(f"{source}: reader: the word {wrong[:80]!r} has not one weight for each of {count} domains")


def _domains(combiner: Combiner) -> set[str]:
    read = combiner.reader.domains if combiner.reader else ()
    first = {name for policy in combiner.policies for name in policy.first}
    named = {name for member in combiner.members.values() for name in member.domains}
    return named | first | {*combiner.none.domains, *read}


def words_of(text: str) -> set[str]:
    """The words of a question, of its start where it is long: letters only, in lower case."""
    return set(_WORD.findall(text[:LONGEST_TEXT].lower()))


def weigh(
    combiner: Combiner,
    answers: Sequence[Answer],
    *,
    domain: str | None = None,
    comparisons: Sequence[Comparison] = (),
) -> Weighing:
    """Weighs the answers in hand.

    A member that the combiner does not know weighs what members weigh on average, and has no pairs.

    Args:
        combiner: The weights.
        answers: At least one.
        domain: The kind of question; one that the combiner does not know adds nothing.
        comparisons: What judges said of the answers.

    Raises:
        ValueError: There are no answers.
    """
    if not answers:
        raise ValueError("there are no answers to weigh")
    groups = grouped(answers)
    answered = len(_counts(answers))
    scores = [_score(combiner, group, answers, domain) for group in groups.items()]
    for judge, weight in combiner.judges.items():
        if weight and (own := [comparison for comparison in comparisons if comparison.judge == judge]):
            for place, strength in enumerate(strengths(list(groups.values()), own)):
                scores[place] += weight * strength
    none = combiner.none
    scores.append(none.weight + none.domains.get(domain or "", 0.0) + sum(none.asked[:answered]))
    *probabilities, nothing = _softmax(scores)
    classes = sorted(
        (
            WeighedClass(key, tuple(places), score, probability)
            for (key, places), score, probability in zip(groups.items(), scores, probabilities, strict=False)
        ),
        key=lambda weighed: (-weighed.probability, weighed.answers),
    )
    if combiner.fallback and (of_best := [row for row in classes if _holds(row, combiner.best_member, answers)]):
        best = of_best[0]
        classes = [best, *(row for row in classes if row is not best)]
    calibrate = combiner.calibration[min(answered, len(combiner.calibration)) - 1]
    return Weighing(
        tuple(classes),
        nothing,
        calibrate(classes[0].probability),
        _spokesman(combiner, classes[0].answers, answers),
    )


def grouped(answers: Sequence[Answer]) -> dict[str, list[int]]:
    """Class key → the places of its answers, in the order of first appearance; each unread answer is its own class."""
    groups: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        groups.setdefault(answer.key if answer.key != UNREAD else f"{UNREAD}#{place}", []).append(place)
    return groups


def _score(combiner: Combiner, group: tuple[str, list[int]], answers: Sequence[Answer], domain: str | None) -> float:
    """One class's score without the judges."""
    key, places = group
    counts = _counts(answers)
    shares: dict[str, float] = {}
    score = combiner.unread if key.startswith(f"{UNREAD}#") else 0.0
    for place in places:
        answer = answers[place]
        share = 1.0 / counts[answer.member]
        shares[answer.member] = shares.get(answer.member, 0.0) + share
        score += share * _answer_score(combiner, answer, domain)
    for pair in combiner.pairs:
        if pair.first in shares and pair.second in shares:
            score += shares[pair.first] * shares[pair.second] * pair.weight
    count = sum(shares.values())
    return score + sum(weight * min(1.0, max(0.0, count - 1.0 - place)) for place, weight in enumerate(combiner.counts))


def _answer_score(combiner: Combiner, answer: Answer, domain: str | None) -> float:
    weights = combiner.members.get(answer.member)
    if weights is None:
        known = combiner.members.values()
        return sum(member.weight for member in known) / len(known)
    score = weights.weight + weights.domains.get(domain or "", 0.0)
    if answer.doubtful:
        score += weights.doubt
    if weights.length is not None:
        z = (answer.length - weights.length.mean) / weights.length.spread
        z = min(LONGEST_Z, max(-LONGEST_Z, z))
        score += weights.length.slope * z + weights.length.square * z * z
    return score


def _spokesman(combiner: Combiner, places: Sequence[int], answers: Sequence[Answer]) -> int:
    """Of equal answers the one to return: by the member that is right most often, undoubtful before doubtful."""

    def merit(place: int) -> tuple[bool, float, int]:
        weights = combiner.members.get(answers[place].member)
        return not answers[place].doubtful, weights.accuracy if weights else 0.0, -place

    return max(places, key=merit)


def _holds(row: WeighedClass, member: str, answers: Sequence[Answer]) -> bool:
    return any(answers[place].member == member for place in row.answers)


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    """How many answers each member gave."""
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer.member] = counts.get(answer.member, 0) + 1
    return counts


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON document, and where it stands."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _numbers(part, f"{place}[{number}]")
    elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        yield place, float(value) if abs(value) < _HUGE else math.inf
