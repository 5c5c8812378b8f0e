"""Every plot of the project, in one style: matplotlib without a display, imported when the first plot is drawn.

Each function returns a matplotlib figure. `save` writes it as a PNG or SVG file; `svg` gives the drawing that an HTML
report holds. Nothing here knows what the values mean.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6db3", "#c9661c", "#8a8a8a"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#aaaaaa",
    "axes.grid": True,
    "axes.labelcolor": "#444444",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "text.color": "#222222",
    "xtick.color": "#aaaaaa",
    "xtick.labelcolor": "#444444",
    "ytick.color": "#aaaaaa",
    "ytick.labelcolor": "#444444",
}


class Mark(NamedTuple):
    """One value to draw.

    Attributes:
        label: Its name.
        estimate: The value, and the lower and upper end of its interval.
        muted: Drawn in grey: a value to compare with.
    """

    label: str
    estimate: tuple[float, float, float]
    muted: bool = False


class Point(NamedTuple):
    """One point of a curve.

    Attributes:
        x: Across.
        y: Up.
        weight: The share of all rows that it stands for, 0 to 1.
    """

    x: float
    y: float
    weight: float


@dataclass(frozen=True)
class HeatMap:
    """One panel of `heat_maps`.

    Attributes:
        title: Above it.
        values: Row by row; NaN leaves a cell empty.
        low: The value at the lower end of the colours.
        high: At the upper end; None: the largest value.
        colours: A matplotlib colour map.
        framed: (row, column) of cells to frame.
    """

    title: str
    values: Sequence[Sequence[float]]
    low: float = 0.0
    high: float | None = None
    colours: str = "viridis"
    framed: Sequence[tuple[int, int]] = ()


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure to a file, whole or not at all; the ending, `.png` or `.svg`, says how.

    Raises:
        MixfuseError: The file cannot be written.
    """
    with atomic_file(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(svg(figure, name=path.stem), encoding="utf-8")
        else:
            with _style():
                figure.savefig(temporary, format="png", dpi=120)


def svg(figure: "Figure", *, name: str, title: str = "") -> str:
    """A figure as an `<svg>` element; the same figure gives the same text every time.

    Args:
        figure: To draw.
        name: Of the plot. It keeps the ids of several plots on one page apart.
        title: Read to people who do not see the plot.
    """
    import matplotlib

    stream = StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    metadata |= {"Title": title} if title else {}
    with _style(), matplotlib.rc_context({"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(stream, format="svg", metadata=metadata)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def intervals(marks: Sequence[Mark], *, reference: float | None = None) -> "Figure":
    """One line for each mark, from top to bottom: its value and its interval, on a scale from 0 to 1.

    Args:
        marks: What to draw.
        reference: Where a dashed line stands.
    """
    with _style():
        figure, axes = _single(8.4, 0.9 + 0.3 * len(marks))
        for row, mark in enumerate(marks):
            value, low, high = mark.estimate
            colour = GREY if mark.muted else BLUE
            axes.plot([low, high], [row, row], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([value], [row], "o", color=colour, markersize=7)
            axes.text(1.03, row, f"{value:.3f}", va="center", fontsize=9)
        if reference is not None:
            axes.axvline(reference, color=GREY, linestyle="--", linewidth=1)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(marks) - 0.5, -0.5), xticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set_yticks(range(len(marks)), [mark.label for mark in marks])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    return figure


def reliability(series: Mapping[str, Sequence[Point]], *, least: float = 0.5) -> "Figure":
    """Confidence against accuracy, beside the diagonal on which the two are equal.

    Args:
        series: Name → points; the area of a point shows its weight.
        least: The least confidence there can be; of two answers the judge's is ½.
    """
    with _style():
        figure, axes = _single(6.4, 4.2)
        axes.plot([least, 1], [least, 1], color=GREY, linestyle="--", linewidth=1)
        for (label, points), colour in zip(series.items(), (BLUE, ORANGE), strict=False):
            across, up = [point.x for point in points], [point.y for point in points]
            axes.plot(across, up, color=colour, alpha=0.5, linewidth=1)
            areas = [20 + 320 * point.weight for point in points]
            axes.scatter(across, up, s=areas, color=colour, alpha=0.65, linewidth=0)
            axes.plot([], [], "o", color=colour, label=label)  # the legend's dots are of one size
        axes.set(xlim=(least - 0.01, 1.01), ylim=(-0.04, 1.04), xlabel="confidence", ylabel="accuracy")
        axes.legend(loc="lower right")
    return figure


def scatter(marks: Sequence[tuple[Mark, float]], *, across: str) -> "Figure":
    """Accuracy, 0 to 1, over what it costs; the names stand in a column at the right.

    Args:
        marks: (the mark, what it costs: 0 or more).
        across: What the cost is, with its unit.
    """
    widest = max((cost for _, cost in marks), default=0.0) or 1.0
    with _style():
        figure, axes = _single(9.0, 4.4)
        ordered = sorted(marks, key=lambda one: one[0].estimate[0])
        heights = _spread([mark.estimate[0] for mark, _ in ordered], 0.065)
        for (mark, cost), height in zip(ordered, heights, strict=True):
            value, low, high = mark.estimate
            colour = GREY if mark.muted else BLUE
            axes.plot([cost, cost], [low, high], color=colour, linewidth=1.5, alpha=0.5)
            axes.plot([cost], [value], "o", color=colour, markersize=6)
            axes.plot([cost, 1.06 * widest], [value, height], color=colour, linewidth=0.6, alpha=0.5)
            axes.text(1.07 * widest, height, mark.label, va="center", fontsize=9, color=colour)
        axes.set(xlim=(-0.03 * widest, 1.06 * widest), ylim=(-0.04, 1.04), xlabel=across, ylabel="accuracy")
    return figure


def tradeoff(
    line: Sequence[tuple[float, tuple[float, float, float]]], marks: Sequence[tuple[Mark, float]], *, across: str
) -> "Figure":
    """A line of accuracy over cost, with a band for its intervals, beside single values with their names.

    Args:
        line: (cost, (accuracy, lower end, upper end)), in any order.
        marks: (the mark, what it costs: 0 or more).
        across: What the cost is, with its unit.
    """
    with _style():
        figure, axes = _single(9.0, 4.8)
        ordered = sorted(line)
        costs = [cost for cost, _ in ordered]
        axes.fill_between(
            costs, [low for _, (_, low, _) in ordered], [high for _, (_, _, high) in ordered], color=BLUE, alpha=0.15
        )
        axes.plot(costs, [value for _, (value, _, _) in ordered], color=BLUE, marker="o", markersize=3)
        for mark, cost in marks:
            value, low, high = mark.estimate
            axes.plot([cost, cost], [low, high], color=ORANGE, linewidth=1.2, alpha=0.5)
            axes.plot([cost], [value], "o", color=ORANGE, markersize=5)
            axes.annotate(mark.label, (cost, value), (5, 3), textcoords="offset points", fontsize=8, color=ORANGE)
        axes.margins(x=0.12)
        axes.set(xlabel=across, ylabel="accuracy")
    return figure


def histogram(counted: Mapping[str, Sequence[float]], edges: Sequence[float], *, across: str, up: str) -> "Figure":
    """How often values fall between edges, for at most two sets: the first filled, the second as an outline.

    Args:
        counted: Name → values.
        edges: Of the bars.
        across: What the values are, with their unit.
        up: What is counted.
    """
    with _style():
        figure, axes = _single(8.4, 3.8)
        looks: tuple[dict[str, Any], ...] = (
            {"color": "#cfcfcf"},
            {"color": BLUE, "histtype": "step", "linewidth": 1.8},
        )
        for (label, values), look in zip(counted.items(), looks, strict=False):
            axes.hist(values, edges, label=label, **look)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=across, ylabel=up)
        axes.legend()
    return figure


def curves(panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]]) -> "Figure":
    """Panels of curves over training steps, three to a row.

    Args:
        panels: (title, name of the curve → (steps, values)).
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _style():
        figure = _blank(5 * columns, 3.2 * rows)
        for number, (title, series) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, number)
            for (label, (steps, values)), colour in zip(series.items(), (BLUE, ORANGE), strict=False):
                axes.plot(
                    steps, values, label=label, color=colour, marker="o" if len(steps) < 30 else None, markersize=3
                )
            axes.set(title=title, xlabel="step")
            if len(series) > 1:
                axes.legend()
    return figure


def heat_maps(panels: Sequence[HeatMap], *, columns: Sequence[str], rows: Sequence[int], across: str) -> "Figure":
    """Heat maps side by side, a layer in each row.

    Args:
        panels: With as many rows and columns as are named.
        columns: Their names.
        rows: The layers' numbers.
        across: What the columns are.
    """
    with _style():
        from matplotlib.patches import Rectangle

        figure = _blank(len(panels) * (2.2 + 0.5 * len(columns)) + 1, 1.8 + 0.24 * len(rows))
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            image = axes.imshow(panel.values, aspect="auto", cmap=panel.colours, vmin=panel.low, vmax=panel.high)
            for row, column in panel.framed:
                axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, fill=False, edgecolor="white"))
            axes.set(title=panel.title, xlabel=across, ylabel="layer")
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), [str(row) for row in rows])
            axes.grid(visible=False)
            figure.colorbar(image)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with needs_extra("measure"):
        import matplotlib
    with matplotlib.rc_context(_STYLE):
        yield


def _blank(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches; without pyplot there is no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _single(width: float, height: float) -> tuple["Figure", Any]:
    figure = _blank(width, height)
    return figure, figure.add_subplot()


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels, ascending, moved as little upwards or back down as keeps them `gap` apart below 1."""
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + gap) if spread else height)
    top = 1.0
    for place in reversed(range(len(spread))):
        spread[place] = min(spread[place], top)
        top = spread[place] - gap
    return spread
