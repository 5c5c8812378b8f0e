"""A `report.md` (`contracts/report.py`) as parts that a page shows: headings, paragraphs, tables and pictures.

Nothing else of Markdown is read: whatever a file holds is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PICTURE = re.compile(r"!\[(.*)\]\(([^()/\\]+\.(?:svg|png))\)")
_MOST_PARTS, _MOST_ROWS = 2000, 5000


@dataclass(frozen=True)
class Part:
    """A part of a report.

    Attributes:
        kind: `heading`, `text`, `table` or `picture`.
        text: The heading, the paragraph, or what the picture shows.
        level: Of a heading: 1 for the report's own.
        file: Of a picture: its file beside the report.
        rows: Of a table: the cells; the first row is the head.
    """

    kind: str
    text: str = ""
    level: int = 0
    file: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def parts(markdown: str) -> list[Part]:
    """Returns the parts of a report; what is beyond 2000 parts or 5000 rows is left out, and said."""
    found: list[Part] = []
    for part in _parts(markdown):
        if len(found) == _MOST_PARTS:
            return [*found, Part("text", "The rest of the report is left out.")]
        found.append(part)
    return found


def _parts(markdown: str) -> Iterator[Part]:
    for block in re.split(r"\n\s*\n", markdown):
        lines = block.strip("\n").splitlines()
        if not lines:
            continue
        if heading := re.match(r"(#{1,6}) (.*)", lines[0]):
            yield Part("heading", heading[2], level=len(heading[1]))
            lines = lines[1:]
        if lines and lines[0].startswith("|"):
            rows = [_cells(line) for line in lines[: _MOST_ROWS + 2] if line.startswith("|")]
            yield Part("table", rows=(rows[0], *rows[2:]))
        elif len(lines) == 1 and (picture := _PICTURE.fullmatch(lines[0])):
            yield Part("picture", picture[1], file=picture[2])
        elif lines:
            yield Part("text", "\n".join(lines))


def _cells(line: str) -> tuple[str, ...]:
    cells = re.split(r"(?<!\\)\|", line.strip()[1:].removesuffix("|"))
    return tuple(cell.strip().replace("\\|", "|") for cell in cells)
