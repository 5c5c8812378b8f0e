"""Recorded questions as arrays, and the features that a combiner weighs: what the fit and the replay compute with.

Axes: Q questions, M members, C classes (the most any question has), F features. A cell is a pair (question, class) in
one state, a state being the set of members that were asked. `artefact.weigh` computes the same scores one question at a
time; `tests/fusion` holds the two against each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mixfuse.fusion.answering.strengths import strengths
from mixfuse.fusion.combiner.artefact import LONGEST_Z, grouped
from mixfuse.fusion.combiner.evidence import UNREAD, Question

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """Where each kind of feature stands among a combiner's parameters.

    Attributes:
        members: Names, in order.
        domains: Names, in order.
        judges: Names, in order.
    """

    members: tuple[str, ...]
    domains: tuple[str, ...]
    judges: tuple[str, ...]

    @property
    def blocks(self) -> dict[str, slice]:
        """Name of a kind of feature → its parameters."""
        m, d, j = len(self.members), len(self.domains), len(self.judges)
        sizes = {
            "member": m,
            "doubt": m,
            "slope": m,
            "square": m,
            "pair": m * (m - 1) // 2,
            "count": m - 1,
            "unread": 1,
            "judge": j,
            "none": 1,
            "asked": m,
            "domain": m * d,
            "none_domain": d,
        }
        places: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            places[name] = slice(start, start + size)
            start += size
        return places

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return max(int(place.stop) for place in self.blocks.values())

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of members, in the order of their parameters."""
        return list(combinations(range(len(self.members)), 2))


@dataclass(frozen=True)
class Table:
    """Questions as arrays.

    Attributes:
        layout: Of the features.
        share: (Q, M, C) The share of a member's answers that are in a class.
        doubt: (Q, M, C) Of it, what is doubtful.
        z: (Q, M, C) Share times the length in standard deviations.
        z2: (Q, M, C) Share times its square.
        unread: (Q, C) Nothing could be read.
        judged: (J, Q, C) Strength by each judge.
        domain: (Q,) Index of the domain; -1 where there is none that the layout has.
        answered: (Q, M) The member answered.
        maybe: (Q, C + 1) The class may be the truth, as far as marks tell; the last is "none of them".
        marked: (Q,) Some answer is marked.
        mark: (Q, M) The share of the member's answers that are right; NaN where none is marked.
        spokesman: (Q, M, C) The mark of the member's first answer in the class, NaN where it has none.
        length: (M, 2) Mean and standard deviation of the members' lengths.
    """

    layout: Layout
    share: Floats
    doubt: Floats
    z: Floats
    z2: Floats
    unread: Bools
    judged: Floats
    domain: NDArray[np.int64]
    answered: Bools
    maybe: Bools
    marked: Bools
    mark: Floats
    spokesman: Floats
    length: Floats

    def __len__(self) -> int:
        return len(self.domain)

    def rows(self, chosen: NDArray[Any]) -> "Table":
        """The table of some of the questions."""
        parts = {
            name: getattr(self, name)[chosen]
            for name in (
                "share", "doubt", "z", "z2", "unread", "domain", "answered", "maybe", "marked", "mark", "spokesman",
            )
        }  # fmt: skip
        return Table(self.layout, judged=self.judged[:, chosen], length=self.length, **parts)


def tabulate(questions: Sequence[Question], layout: Layout, length: Floats | None = None) -> Table:
    """Makes the arrays.

    Args:
        questions: Answers of members that the layout does not know are left out.
        layout: Of the features.
        length: Means and standard deviations of the members' lengths; these questions' own where it is None.
    """
    known = {name: place for place, name in enumerate(layout.members)}
    own = [[answer for answer in question.answers if answer.member in known] for question in questions]
    groups = [grouped(answers) for answers in own]
    q, m, c = len(questions), len(layout.members), max((len(group) for group in groups), default=1) or 1
    if length is None:
        length = _lengths(own, layout)
    arrays = {name: np.zeros((q, m, c)) for name in ("share", "doubt", "z", "z2")}
    unread, maybe = np.zeros((q, c), bool), np.zeros((q, c + 1), bool)
    judged = np.zeros((len(layout.judges), q, c))
    domain = np.full(q, -1)
    answered, marked = np.zeros((q, m), bool), np.zeros(q, bool)
    mark, spokesman = np.full((q, m), np.nan), np.full((q, m, c), np.nan)
    for row, (question, answers, group) in enumerate(zip(questions, own, groups, strict=True)):
        if question.domain in layout.domains:
            domain[row] = layout.domains.index(question.domain)
        counts = np.zeros(m)
        for answer in answers:
            counts[known[answer.member]] += 1
        for number, (key, places) in enumerate(group.items()):
            unread[row, number] = key.startswith(f"{UNREAD}#")
            for place in places:
                answer = answers[place]
                member = known[answer.member]
                share = 1.0 / counts[member]
                z = np.clip((answer.length - length[member, 0]) / length[member, 1], -LONGEST_Z, LONGEST_Z)
                arrays["share"][row, member, number] += share
                arrays["doubt"][row, member, number] += share * answer.doubtful
                arrays["z"][row, member, number] += share * z
                arrays["z2"][row, member, number] += share * z * z
                if answer.right is not None and np.isnan(spokesman[row, member, number]):
                    spokesman[row, member, number] = answer.right
        answered[row] = counts > 0
        for name, member in known.items():
            marks = [answer.right for answer in answers if answer.member == name and answer.right is not None]
            if marks:
                mark[row, member] = np.mean(marks)
        maybe[row, :], marked[row] = _possible([[answers[place].right for place in group[key]] for key in group], c)
        for number, judge in enumerate(layout.judges):
            # Comparisons name places among all answers; the layout may leave some out.
            places_of = {id(answer): place for place, answer in enumerate(question.answers)}
            classes = [[places_of[id(answers[place])] for place in places] for places in group.values()]
            of_all = {place for places in classes for place in places}
            by_judge = [
                comparison
                for comparison in question.comparisons
                if comparison.judge == judge and comparison.first in of_all and comparison.second in of_all
            ]
            if by_judge:
                judged[number, row, : len(classes)] = strengths(classes, by_judge)
    return Table(
        layout, **arrays, unread=unread, judged=judged, domain=domain, answered=answered, maybe=maybe, marked=marked,
        mark=mark, spokesman=spokesman, length=length,
    )  # fmt: skip


@dataclass(frozen=True)
class Cells:
    """The cells of one or more states: a row of features for each class of each question, and one for "none".

    Attributes:
        features: (cells, F), sparse.
        question: (cells,) A number for each pair of question and state, counted from 0.
        maybe: (cells,) The class may be the truth.
        weight: (pairs of question and state,) Of the likelihood.
        row: (pairs,) The question's row in the table.
    """

    features: Any
    question: NDArray[np.int64]
    maybe: Bools
    weight: Floats
    row: NDArray[np.int64]

    @staticmethod
    def joined(parts: Sequence["Cells"]) -> "Cells":
        """Several states' cells as one."""
        offsets = np.cumsum([0, *(len(part.weight) for part in parts[:-1])])
        return Cells(
            sparse.vstack([part.features for part in parts]).tocsr(),
            np.concatenate([part.question + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate([part.maybe for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.row for part in parts]),
        )


def state_shares(table: Table, asked: Bools) -> Floats:
    """(Q, M, C) the shares where only some members were asked.

    Args:
        table: The questions.
        asked: (M,) or (Q, M) Whether each member was asked.
    """
    return table.share * np.broadcast_to(asked, table.answered.shape)[:, :, None]


def dense_scores(table: Table, parameters: Floats, asked: Bools) -> tuple[Floats, Bools]:
    """The scores in a state.

    Returns:
        (Q, C + 1) scores, the last of "none"; minus infinity where there is no such class. (Q, C) which classes exist.
    """
    blocks, layout = table.layout.blocks, table.layout
    mask = np.broadcast_to(asked, table.answered.shape)[:, :, None]
    share = table.share * mask
    weight = parameters[blocks["member"]][None, :] + _by_domain(table, parameters)
    scores = np.einsum("qmc,qm->qc", share, weight)
    for name, values in (("doubt", table.doubt), ("slope", table.z), ("square", table.z2)):
        scores += np.einsum("qmc,m->qc", values * mask, parameters[blocks[name]])
    pair = parameters[blocks["pair"]]
    for number, (first, second) in enumerate(layout.pairs):
        if pair[number]:
            scores += pair[number] * share[:, first] * share[:, second]
    count = share.sum(1)
    for place, step in enumerate(parameters[blocks["count"]]):
        scores += step * np.clip(count - 1 - place, 0, 1)
    scores += parameters[blocks["unread"]] * table.unread
    scores += np.einsum("jqc,j->qc", table.judged, parameters[blocks["judge"]])
    exists = count > 0
    answered = (table.answered & np.broadcast_to(asked, table.answered.shape)).sum(1)
    steps = np.concatenate([[0.0], np.cumsum(parameters[blocks["asked"]])])
    none = parameters[blocks["none"]][0] + steps[answered]
    of_domain = np.append(parameters[blocks["none_domain"]], 0.0)
    none = none + of_domain[table.domain]
    return np.column_stack([np.where(exists, scores, -np.inf), none]), exists


def probabilities(scores: Floats) -> Floats:
    """Row-wise softmax."""
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(1, keepdims=True)
    return result


def cells(table: Table, asked: Bools, weight: Floats) -> Cells:
    """The cells of the table's marked questions in one state.

    Args:
        table: The questions.
        asked: (Q, M) Whether each member was asked.
        weight: (Q,) Of each question's likelihood.
    """
    layout = table.layout
    mask = asked[:, :, None]
    share = table.share * mask
    count = share.sum(1)  # (Q, C)
    exists = count > 0
    answered = table.answered & asked
    usable = table.marked & answered.any(1)
    row_of, class_of = np.nonzero(exists & usable[:, None])
    rows = np.flatnonzero(usable)
    d = len(layout.domains)
    own = share[row_of, :, class_of]  # (cells, M)
    parts: dict[str, Any] = {
        "member": own,
        "doubt": (table.doubt * mask)[row_of, :, class_of],
        "slope": (table.z * mask)[row_of, :, class_of],
        "square": (table.z2 * mask)[row_of, :, class_of],
        "pair": np.column_stack([own[:, a] * own[:, b] for a, b in layout.pairs] or [np.zeros((len(own), 0))]),
        "count": np.clip(count[row_of, class_of][:, None] - 1 - np.arange(len(layout.members) - 1), 0, 1),
        "unread": table.unread[row_of, class_of][:, None],
        "judge": table.judged[:, row_of, class_of].T,
        "none": np.zeros((len(own), 1)),
        "asked": np.zeros_like(own),
    }
    in_domain = sparse.csr_matrix(
        (np.ones((table.domain[row_of] >= 0).sum()),
         (np.flatnonzero(table.domain[row_of] >= 0), table.domain[row_of][table.domain[row_of] >= 0])),
        shape=(len(own), d),
    )  # fmt: skip
    by_domain = [in_domain.multiply(own[:, member][:, None]) for member in range(len(layout.members))]
    answers = sparse.hstack([sparse.csr_matrix(np.column_stack(list(parts.values()))), *by_domain,
                             sparse.csr_matrix((len(own), d))]).tocsr()  # fmt: skip
    nothing = np.zeros((len(rows), layout.size))
    blocks = layout.blocks
    nothing[:, blocks["none"]] = 1.0
    nothing[:, blocks["asked"]] = np.arange(len(layout.members)) < answered[rows].sum(1)[:, None]
    known = table.domain[rows] >= 0
    nothing[np.flatnonzero(known), blocks["none_domain"].start + table.domain[rows][known]] = 1.0
    number = np.cumsum(usable) - 1
    # A class of members that were not asked is not in hand: where it alone is right, "none" is.
    in_hand = np.where(exists, table.maybe[:, :-1], False)
    none_right = table.maybe[:, -1] | (table.maybe[:, :-1] & ~exists).any(1)
    return Cells(
        sparse.vstack([answers, sparse.csr_matrix(nothing)]).tocsr(),
        np.concatenate([number[row_of], np.arange(len(rows))]),
        np.concatenate([in_hand[row_of, class_of], none_right[rows]]),
        weight[rows],
        rows,
    )


def _by_domain(table: Table, parameters: Floats) -> Floats:
    """(Q, M) what a question's domain adds to each member's weight."""
    layout = table.layout
    values = parameters[layout.blocks["domain"]].reshape(len(layout.members), len(layout.domains))
    values = np.column_stack([values, np.zeros(len(layout.members))])
    result: Floats = values[:, table.domain].T
    return result


def _lengths(answers: Sequence[Sequence[Any]], layout: Layout) -> Floats:
    """(M, 2) means and standard deviations."""
    lengths: dict[str, list[float]] = {name: [] for name in layout.members}
    for several in answers:
        for answer in several:
            lengths[answer.member].append(answer.length)
    rows = [(np.mean(values), np.std(values)) if values else (0.0, 1.0) for values in lengths.values()]
    return np.array([(mean, spread if spread > 1e-6 else 1.0) for mean, spread in rows])


def _possible(marks: Sequence[Sequence[bool | None]], classes: int) -> tuple[Bools, bool]:
    """Which classes may be the truth, "none" last; and whether anything is marked.

    A class is right or wrong by the majority of its marks. Where one is right, no other is. Where all that is marked is
    wrong, the truth is one of the others, or none.
    """
    possible = np.zeros(classes + 1, bool)
    means = [[mark for mark in several if mark is not None] for several in marks]
    right = [bool(values) and sum(values) * 2 > len(values) for values in means]
    unmarked = [not values for values in means]
    if any(right):
        possible[: len(right)] = right
    else:
        possible[: len(unmarked)] = unmarked
        possible[-1] = True
    return possible, any(means)
