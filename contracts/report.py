"""Reports of measurements: Markdown and HTML for people, JSON for machines, and the plots both show.

Plots are SVG written here: a few lines and circles need no plotting library in the gateway's room. The HTML is one file
that loads nothing, and lists every value of the JSON at its end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.files import write_json, write_text

_FONT = 'font-family="system-ui, sans-serif" font-size="12"'
_BLUE, _ORANGE, _GREY = "#2f6db3", "#c9661c", "#8a8a8a"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
figure { margin: 1rem 0; }
figcaption { color: #555; font-size: 90%; }
details table { font-size: 85%; }
"""


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: Of its file beside the Markdown, without the ending.
        svg: The drawing.
        caption: What is to be seen.
    """

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then paragraphs, tables and plots in this order."""

    title: str
    blocks: Sequence[str | Table | Plot]


def write(out: Path, title: str, sections: Sequence[Section], data: dict[str, Any]) -> None:
    """Writes `report.md` with its plots, `report.html` and `report.json` into a folder.

    Args:
        out: The folder; what an earlier report left there is replaced.
        title: The heading.
        sections: In order.
        data: Every figure, as JSON.

    Raises:
        MixfuseError: The folder cannot be written.
    """
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                write_text(out / f"{block.name}.svg", block.svg)
    write_text(out / "report.md", _markdown(title, sections))
    write_text(out / "report.html", _html(title, sections, data))
    write_json(out / "report.json", data)


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: str | Table | Plot) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Plot):
        return f"![{block.caption}]({block.name}.svg)"
    rows = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows
    )


def _html(title: str, sections: Sequence[Section], data: dict[str, Any]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [_html_block(block) for block in section.blocks]
    everything = Table(("value of", ""), list(flat(data)))
    parts.append(f"<details><summary>Every value of report.json</summary>{_html_block(everything)}</details>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _html_block(block: str | Table | Plot) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Plot):
        return f"<figure>{block.svg}<figcaption>{escape(block.caption)}</figcaption></figure>"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in block.header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def flat(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a JSON document: (its path, the value as JSON writes it)."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from flat(value, f"{path}[{number}]")
    else:
        yield path, json.dumps(data, ensure_ascii=False)


class Mark(NamedTuple):
    """A value to draw, with its interval and its name; where there is no interval, only the point."""

    label: str
    figure: tuple[float, float, float]
    aside: bool = False
    """Drawn in grey: something to compare with."""


def intervals(name: str, marks: Sequence[Mark], caption: str, *, at: float | None = None) -> Plot:
    """A line for each mark: its point and its interval, on a scale from 0 to 1.

    Args:
        name: Of the plot.
        marks: From top to bottom.
        caption: What is to be seen.
        at: Where a dashed line stands.
    """
    left, width, step = 250, 420, 24
    bottom = 12 + step * len(marks)

    def x(value: float) -> float:
        return left + width * min(max(value, 0.0), 1.0)

    drawn = [_line(x(tick), 8, x(tick), bottom, "#e4e4e4") for tick in (0, 0.25, 0.5, 0.75, 1)]
    drawn += [_text(x(tick), bottom + 16, f"{tick:g}", anchor="middle") for tick in (0, 0.25, 0.5, 0.75, 1)]
    if at is not None:
        drawn.append(_line(x(at), 8, x(at), bottom, _GREY, dashed=True))
    for place, mark in enumerate(marks):
        y = 24 + step * place - 4
        colour = _GREY if mark.aside else _BLUE
        value, low, high = mark.figure
        drawn.append(_text(left - 10, y + 4, mark.label, anchor="end"))
        drawn.append(_line(x(low), y, x(high), y, colour, width=2))
        drawn.append(_circle(x(value), y, 4, colour, f"{mark.label}: {mark.figure}"))
        drawn.append(_text(left + width + 10, y + 4, f"{value:.3f}"))
    return Plot(name, _svg(left + width + 70, bottom + 26, drawn, caption), caption)


class Point(NamedTuple):
    """One point of a curve: where, how high, and how much it stands for (a share of all, 0 to 1)."""

    x: float
    y: float
    weight: float


def reliability(name: str, series: Mapping[str, Sequence[Point]], caption: str) -> Plot:
    """Confidence against accuracy, from ½ to 1 and 0 to 1, beside the diagonal; at most two series.

    Args:
        name: Of the plot.
        series: Name → points; the size of a point shows its weight.
        caption: What is to be seen.
    """
    left, top, width, height = 60, 16, 360, 300

    def x(value: float) -> float:
        return left + width * (value - 0.5) * 2

    def y(value: float) -> float:
        return top + height * (1 - value)

    drawn = [_line(x(0.5), y(tick), x(1), y(tick), "#e4e4e4") for tick in (0, 0.25, 0.5, 0.75, 1)]
    drawn += [_text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end") for tick in (0, 0.25, 0.5, 0.75, 1)]
    drawn += [_text(x(tick), y(0) + 18, f"{tick:g}", anchor="middle") for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1)]
    drawn.append(_line(x(0.5), y(0.5), x(1), y(1), _GREY, dashed=True))
    drawn.append(_text(left + width / 2, y(0) + 36, "confidence", anchor="middle"))
    drawn.append(_text(left, top - 4, "accuracy"))
    for place, ((label, points), colour) in enumerate(zip(series.items(), (_BLUE, _ORANGE), strict=False)):
        path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for point in points:
            said = f"{label}: confidence {point.x:.3f}, accuracy {point.y:.3f}, {100 * point.weight:.0f} % of the pairs"
            drawn.append(_circle(x(point.x), y(point.y), 3 + 10 * point.weight**0.5, colour, said, opacity=0.6))
        drawn.append(_circle(left + width + 24, top + 12 + 20 * place, 5, colour, label))
        drawn.append(_text(left + width + 36, top + 16 + 20 * place, label))
    return Plot(name, _svg(left + width + 150, top + height + 50, drawn, caption), caption)


def scatter(name: str, marks: Sequence[tuple[Mark, float]], across: str, caption: str) -> Plot:
    """Marks over what they take.

    Args:
        name: Of the plot.
        marks: (the mark, what it takes: 0 or more).
        across: What that is, with its unit.
        caption: What is to be seen.
    """
    left, top, width, height = 60, 16, 480, 280
    most = max((taken for _, taken in marks), default=0.0) or 1.0

    def x(value: float) -> float:
        return left + width * value / (1.1 * most)

    def y(value: float) -> float:
        return top + height * (1 - min(max(value, 0.0), 1.0))

    drawn = [_line(left, y(tick), left + width, y(tick), "#e4e4e4") for tick in (0, 0.25, 0.5, 0.75, 1)]
    drawn += [_text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end") for tick in (0, 0.25, 0.5, 0.75, 1)]
    for share in (0, 0.5, 1):
        drawn.append(_text(x(share * most), y(0) + 18, f"{share * most:.3g}", anchor="middle"))
    drawn.append(_text(left + width / 2, y(0) + 36, across, anchor="middle"))
    drawn.append(_text(left, top - 4, "accuracy"))
    for mark, taken in marks:
        colour = _GREY if mark.aside else _BLUE
        drawn.append(_line(x(taken), y(mark.figure[1]), x(taken), y(mark.figure[2]), colour, width=2))
        drawn.append(_circle(x(taken), y(mark.figure[0]), 4, colour, f"{mark.label}: {mark.figure} at {taken:.4g}"))
        right = taken > 0.6 * most  # of the plot, so that the name stays inside
        aside = x(taken) + (-7 if right else 7)
        drawn.append(_text(aside, y(mark.figure[0]) - 5, mark.label, anchor="end" if right else "start"))
    return Plot(name, _svg(left + width + 20, top + height + 50, drawn, caption), caption)


def _svg(width: float, height: float, drawn: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" {_FONT}>\n<title>{escape(title)}</title>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: int = 1, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dash}/>'


def _circle(x: float, y: float, radius: float, colour: str, said: str, *, opacity: float = 1) -> str:
    centre = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
    return f'<circle {centre} fill="{colour}" fill-opacity="{opacity:g}"><title>{escape(said)}</title></circle>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
