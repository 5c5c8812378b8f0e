"""Votes of people on pairs of answers: which pair to ask about next, and how far people and the judge agree.

A vote is feedback of its trace (`mixfuse.contracts.trace.Feedback`): the winner is `correct`, the loser `wrong`, both
are `wrong` if both are bad, and a tie marks nothing. `metadata.arena` says which pair it was about.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from mixfuse.contracts.mode_names import SINGLE_MODEL_MODE
from mixfuse.contracts.trace import Trace, Verdict
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.trace_facts import traces_of

VOTES = ("first", "second", "tie", "bad")
"""What a vote says of a pair: the one with the lower number is better, the other is, a tie, both are bad."""

_CHUNK, _CHUNKS = 30, 8
_MOST_VOTED = 400
_LONGEST_NAME = 80


class Place(NamedTuple):
    """A place in the queue: what its traces are ordered by, the greatest first."""

    flipped: int
    unsure: int
    at: float
    id: str


@dataclass(frozen=True)
class Asked:
    """A pair to ask about.

    Attributes:
        trace: The trace.
        pair: Two candidates, the lower number first.
    """

    trace: Trace
    pair: tuple[int, int]


class Next(NamedTuple):
    """What comes next in the queue.

    Attributes:
        asked: The pair; None if none was found.
        after: Where to look the next time; None for the beginning.
        more: Whether there is more to look through, after `after`.
    """

    asked: Asked | None
    after: Place | None
    more: bool


@dataclass(frozen=True)
class Vote:
    """A person's vote on a pair.

    Attributes:
        user: Who voted.
        pair: The trace's id and the two candidates, the lower number first.
        vote: One of `VOTES`.
    """

    user: str
    pair: tuple[str, int, int]
    vote: str


def following(
    connection: Connection, owner: str | None, user: str, after: Place | None, skipped: Container[str] = ()
) -> Next:
    """Returns the next pair that the person has neither voted on nor skipped.

    First come traces in which the judge's two orders disagreed, then those with low confidence, then the newest. Of a
    few that follow each other, the one is taken in which the judge was least sure.

    Args:
        connection: The database.
        owner: The API key whose traces count; None for all.
        user: Who votes.
        after: Where to begin; None for the beginning.
        skipped: The traces that the person skipped.
    """
    for _ in range(_CHUNKS):
        places = _places(connection, owner, after)
        found = []
        for trace in traces_of(connection, [place.id for place in places if place.id not in skipped]):
            pair = hardest(trace)
            if pair is not None and not any(vote.user == user for vote in votes_of(trace.id, trace.feedback)):
                found.append((_sureness(trace, pair), Asked(trace, pair)))
        if found:
            return Next(min(found, key=lambda one: one[0])[1], after, more=True)
        if len(places) < _CHUNK:
            return Next(None, None, more=False)
        after = places[-1]
    return Next(None, after, more=True)


def answers(trace: Trace) -> dict[int, str]:
    """Returns each candidate's last text: in a debate its last revision."""
    calls = [call for call in trace.calls if call.outcome == "ok" and call.stage in ("answer", "revision")]
    return {
        call.candidate: call.text
        for call in calls
        if call.candidate is not None and call.candidate < len(trace.candidates) and call.text and call.text.strip()
    }


def hardest(trace: Trace) -> tuple[int, int] | None:
    """Returns the pair of different answers that the judge was least sure of; None if all answers are equal."""
    given = {index: " ".join(answer.split()) for index, answer in answers(trace).items()}
    pairs = [pair for pair in combinations(sorted(given), 2) if given[pair[0]] != given[pair[1]]]
    return min(pairs, key=lambda pair: _sureness(trace, pair), default=None)


def verdict_on(trace: Trace, pair: tuple[int, int]) -> Verdict | None:
    """Returns the judge's last verdict on a pair."""
    return next((one for one in reversed(trace.verdicts) if {one.first, one.second} == {*pair}), None)


def _sureness(trace: Trace, pair: tuple[int, int]) -> tuple[int, float]:
    """The less, the earlier a pair is asked about: flipped, then close to a half, then not judged."""
    verdict = verdict_on(trace, pair)
    if verdict is None:
        return (2, 0.0)
    return (int(verdict.consistent), abs(verdict.score - 0.5))


def judged(trace: Trace, pair: tuple[int, int]) -> str | None:
    """Returns the judge's vote on a pair; None if it was not asked."""
    verdict = verdict_on(trace, pair)
    if verdict is None:
        return None
    if verdict.winner == "tie" or not verdict.consistent:
        return "tie"
    winner = verdict.first if verdict.winner == "first" else verdict.second
    return "first" if winner == pair[0] else "second"


def feedback_of(pair: tuple[int, int], vote: str, user: str, comment: str) -> dict[str, Any]:
    """Returns a vote as feedback of its trace."""
    marks: dict[str, Any] = {
        "first": {"correct": [pair[0]], "wrong": [pair[1]]},
        "second": {"correct": [pair[1]], "wrong": [pair[0]]},
        "tie": {},
        "bad": {"wrong": [*pair]},
    }[vote]
    about = {"arena": {"first": pair[0], "second": pair[1], "vote": vote}}
    return {**marks, "user": user, **({"comment": comment} if comment else {}), "metadata": about}


def votes_of(trace_id: str, feedback: Sequence[Any]) -> list[Vote]:
    """Returns the votes among a trace's feedback; whatever else clients sent is left out."""
    found = []
    for one in feedback:
        metadata = one.get("metadata") if isinstance(one, dict) else None
        about = metadata.get("arena") if isinstance(metadata, dict) else None
        if not isinstance(about, dict) or not isinstance(one.get("user"), str):
            continue
        first, second, vote = about.get("first"), about.get("second"), about.get("vote")
        if isinstance(first, int) and isinstance(second, int) and first < second and vote in VOTES:
            found.append(Vote(one["user"], (trace_id, first, second), vote))
    return found


def person(value: str) -> str:
    """Returns the name that a person gave, with single spaces.

    Raises:
        RequestError: It is empty or too long, or cannot be printed.
    """
    name = " ".join(value.split())
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        message = f"'name' must be a name of at most {_LONGEST_NAME} characters that can be printed"
        raise RequestError(message, code="invalid_value", param="name")
    return name


class Agreement(NamedTuple):
    """How far two agree.

    Attributes:
        one: A person.
        other: Another person, or None for the judge.
        pairs: How many pairs both have a vote on.
        same: On how many they say the same.
        kappa: Cohen's kappa; None if chance alone explains every vote.
    """

    one: str
    other: str | None
    pairs: int
    same: int
    kappa: float | None


class Standing(NamedTuple):
    """What the votes say.

    Attributes:
        counts: Person → how many pairs they voted on.
        agreements: Between people, then with the judge.
        partial: Whether older votes were left out.
    """

    counts: dict[str, int]
    agreements: list[Agreement]
    partial: bool


def standing(connection: Connection, owner: str | None) -> Standing:
    """Reads the votes on the newest traces with feedback, and compares them."""
    where, bound = ("AND key_id = :key_id", {"key_id": owner}) if owner is not None else ("", {})
    query = (
        f"SELECT id FROM trace_facts WHERE feedback > 0 {where} "  # noqa: S608 - our own words
        "ORDER BY created_at DESC, id DESC LIMIT :most"
    )
    ids = list(connection.execute(text(query), {**bound, "most": _MOST_VOTED + 1}).scalars())
    by_user: dict[str, dict[tuple[str, int, int], str]] = {}
    judge: dict[tuple[str, int, int], str] = {}
    for trace in traces_of(connection, ids[:_MOST_VOTED]):
        for vote in votes_of(trace.id, trace.feedback):
            by_user.setdefault(vote.user, {})[vote.pair] = vote.vote
            if (said := judged(trace, vote.pair[1:])) is not None:
                judge[vote.pair] = said
    return stand(by_user, judge, partial=len(ids) > _MOST_VOTED)


def stand(
    by_user: Mapping[str, Mapping[tuple[str, int, int], str]],
    judge: Mapping[tuple[str, int, int], str],
    *,
    partial: bool = False,
) -> Standing:
    """Compares people with each other and with the judge.

    Args:
        by_user: Person → pair → vote.
        judge: Pair → what the judge says; it cannot say that both are bad.
        partial: Whether older votes were left out.
    """
    # The people with the most votes: their pairs grow with the square.
    people = sorted(by_user, key=lambda user: (-len(by_user[user]), user))[:20]
    compared = [compare(one, by_user[one], other, by_user[other]) for one, other in combinations(people, 2)]
    # The judge cannot say that both are bad; it is then compared as a tie.
    compared += [
        compare(user, {pair: "tie" if vote == "bad" else vote for pair, vote in by_user[user].items()}, None, judge)
        for user in people
    ]
    counts = {user: len(by_user[user]) for user in people}
    return Standing(counts, [one for one in compared if one.pairs], partial)


def compare(
    one: str, votes: Mapping[tuple[str, int, int], str], other: str | None, others: Mapping[tuple[str, int, int], str]
) -> Agreement:
    """Compares two voters on the pairs that both voted on, by Cohen's kappa (Cohen 1960)."""
    both = sorted(votes.keys() & others.keys())
    same = sum(votes[pair] == others[pair] for pair in both)
    counts, other_counts = Counter(votes[pair] for pair in both), Counter(others[pair] for pair in both)
    count = len(both)
    chance = sum(counts[vote] * other_counts[vote] for vote in VOTES)  # times count²
    kappa = None if chance == count * count else (count * same - chance) / (count * count - chance)
    return Agreement(one, other, count, same, kappa)


def _places(connection: Connection, owner: str | None, after: Place | None) -> list[Place]:
    conditions, bound = ["disagreement = 1", "outcome = 'ok'", "mode != :single"], {"single": SINGLE_MODEL_MODE}
    values: dict[str, Any] = {**bound, "most": _CHUNK}
    if owner is not None:
        conditions.append("key_id = :key_id")
        values["key_id"] = owner
    if after is not None:
        conditions.append("(flipped, unsure, created_at, id) < (:flipped, :unsure, :at, :id)")
        values |= after._asdict()
    query = (
        f"SELECT flipped, unsure, created_at, id FROM trace_facts WHERE {' AND '.join(conditions)} "  # noqa: S608
        "ORDER BY flipped DESC, unsure DESC, created_at DESC, id DESC LIMIT :most"
    )
    return [Place(*row) for row in connection.execute(text(query), values)]
