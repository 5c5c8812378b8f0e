"""Marks of people on answers: which candidates of a trace are right or wrong, and what changes in a sheet of them.

A mark is feedback of its trace (`mixfuse.contracts.trace.Feedback`): `correct`, `wrong`, or `unmarked`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixfuse.contracts.trace import Trace
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.store.export_traces import by_feedback
from mixfuse.fusion.store.trace_facts import question
from mixfuse.fusion.ui.trace_view import Shown, candidates

RIGHT, WRONG, UNMARKED = "right", "wrong", ""
MARKS = (RIGHT, WRONG, UNMARKED)
_LETTERS = {RIGHT: "r", WRONG: "w", UNMARKED: "-"}
_FIELDS = {RIGHT: "correct", WRONG: "wrong", UNMARKED: "unmarked"}


class Column(NamedTuple):
    """A column of the sheet: a member, and which of its samples, from 1."""

    member: str
    sample: int

    @property
    def title(self) -> str:
        """It in words."""
        return self.member if self.sample == 1 else f"{self.member} ({self.sample})"


@dataclass(frozen=True)
class Cell:
    """One answer.

    Attributes:
        answer: It, with its class of equal answers.
        mark: One of `MARKS`.
    """

    answer: Shown
    mark: str


@dataclass(frozen=True)
class Row:
    """One trace.

    Attributes:
        trace: The trace.
        question: The last thing that the user said.
        cells: Column → answer; a candidate without an answer has none.
        shown: All marks as one text, for `read_shown`.
    """

    trace: Trace
    question: str
    cells: dict[Column, Cell]
    shown: str


def marks_of(trace: Trace) -> list[str]:
    """Returns the mark of each candidate, one of `MARKS`."""
    known = by_feedback(trace)
    marks = {True: RIGHT, False: WRONG, None: UNMARKED}
    return [marks[known.get(index)] for index in range(len(trace.candidates))]


def row_of(trace: Trace, config: FusionConfig) -> Row:
    """Returns a trace as a row of the sheet."""
    marks = marks_of(trace)
    samples = Counter[str]()
    cells = {}
    for answer in candidates(trace, config):
        samples[answer.member] += 1
        if answer.text is not None and answer.text.strip():
            cells[Column(answer.member, samples[answer.member])] = Cell(answer, marks[answer.index])
    return Row(trace, question(trace), cells, "".join(_LETTERS[mark] for mark in marks))


def columns_of(rows: Sequence[Row], members: Sequence[str]) -> list[Column]:
    """Returns the columns that the rows have together: members in the config's order first, then earlier ones."""
    order = {member: place for place, member in enumerate(members)}
    found = {column for row in rows for column in row.cells}
    return sorted(found, key=lambda column: (order.get(column.member, len(order)), column))


def read_shown(shown: str, index: int) -> str:
    """Returns the mark of a candidate as a sheet showed it."""
    letter = shown[index : index + 1]
    return next((mark for mark, known in _LETTERS.items() if known == letter), UNMARKED)


def changes(submitted: Mapping[int, str], shown: str) -> dict[int, str]:
    """Returns the marks that a person changed: what others marked meanwhile is no change.

    Args:
        submitted: Candidate → its mark in the form.
        shown: The marks that the form was made with.
    """
    return {index: mark for index, mark in submitted.items() if mark in MARKS and mark != read_shown(shown, index)}


def spread(changed: Mapping[int, str], equal: Sequence[Shown]) -> dict[int, str]:
    """Returns changed marks with those of equal answers, unless these were changed themselves.

    Args:
        changed: Candidate → its new mark.
        equal: The candidates with their classes of equal answers.
    """
    group_of = {one.index: one.group for one in equal if one.group >= 0}
    by_group: dict[int, str] = {}
    for index, mark in changed.items():
        if index in group_of:
            by_group.setdefault(group_of[index], mark)
    everyone = {index: by_group[group] for index, group in group_of.items() if group in by_group}
    return everyone | dict(changed)


def feedback_of(changed: Mapping[int, str], user: str) -> dict[str, Any]:
    """Returns changed marks as feedback of their trace; without a name it is the API key's."""
    said: dict[str, Any] = {}
    for index, mark in sorted(changed.items()):
        said.setdefault(_FIELDS[mark], []).append(index)
    return said | ({"user": user} if user else {})
