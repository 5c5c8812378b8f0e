"""Charts of a run as points in an SVG's own units: curves over steps, and the heat map of layers and experts.

A template draws them with classes alone, because the page's policy allows no inline style.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixfuse.app.runs import Experts, Run, differences

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 480, 210, 76, 26, 10, 10
"""The size of a chart of curves and its margins."""
CELL = 12
"""The size of a cell of the heat map."""
LEVELS = 10
"""Colours of the heat map."""

_MOST_POINTS = 300
# The keys are those of train/stages/training_metrics.py.
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", "training"), ("eval_loss", "held out"))),
    ("Learning rate", (("learning_rate", "learning rate"),)),
    ("Tokens a second", (("tokens_per_second", "tokens/s"),)),
    (
        "Judge: right in both orders, and consistent",
        (
            ("eval_both_orders_correct", "right in both orders"),
            ("eval_consistency", "the same in both orders"),
            ("eval_order_averaged", "right by the mean of both"),
        ),
    ),
    (
        "Judge: calibration error",
        (("eval_calibration_error_before", "as it is"), ("eval_calibration_error", "with the fitted temperature")),
    ),
    ("Judge: fitted temperature", (("eval_temperature", "temperature"),)),
    ("Gradient norm", (("grad_norm", "gradient norm"),)),
    ("Model FLOPs utilisation", (("mfu", "share of the peak"),)),
    ("Router: auxiliary loss", (("aux_loss", "auxiliary loss"),)),
    ("Router: load of an expert, 1 = even", (("expert_load_max", "busiest"), ("expert_load_min", "idlest"))),
    ("Token accuracy", (("mean_token_accuracy", "training"), ("eval_token_accuracy", "held out"))),
    ("Reward accuracy", (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out"))),
    ("Reward margin", (("rewards/margins", "training"), ("eval_rewards/margins", "held out"))),
)
"""A chart's title, and its curves: the key of a row and its name for people."""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: For the legend.
        look: Its CSS classes.
        points: `x,y x,y …`, as an SVG polyline takes them.
        dots: (x, y) of the single points, where they are few.
        first: The first value, as text; so the others.
        last: The last value.
        least: The least value, with its step.
        most: The largest value, with its step.
    """

    name: str
    look: str
    points: str
    dots: Sequence[tuple[float, float]]
    first: str
    last: str
    least: str
    most: str


@dataclass(frozen=True)
class Chart:
    """A chart of curves over steps.

    Attributes:
        title: What it shows.
        curves: At least one.
        up: (y, value) of the grid lines.
        across: (x, step) of the marks below.
        words: The chart in words, for those who do not see it.
    """

    title: str
    curves: Sequence[Curve]
    up: Sequence[tuple[float, str]]
    across: Sequence[tuple[float, str]]
    words: str


@dataclass(frozen=True)
class Heat:
    """The heat map: layers down, experts across.

    Attributes:
        width: Of the drawing.
        height: Of the drawing.
        levels: Level → a path over its cells, 0 the least share.
        framed: (x, y) of the experts that are trained.
        rows: A line for each layer: its number, the busiest expert with its share, the idlest, and the trained ones.
        most: The share at the upper end of the colours.
        columns: (x, expert) of the marks.
        layers: (y, layer) of the marks.
    """

    width: int
    height: int
    levels: Sequence[tuple[int, str]]
    framed: Sequence[tuple[int, int]]
    rows: Sequence[tuple[int, str, str, str]]
    most: float
    columns: Sequence[tuple[int, int]]
    layers: Sequence[tuple[int, int]]


def charts(run: Run, baseline: Run | None = None) -> list[Chart]:
    """Returns the charts of a run; those of a baseline are dashed in them."""
    made = []
    for title, keys in CHARTS:
        given = [
            (name if one is run else f"{name}, baseline", f"c{number}" + ("" if one is run else " dashed"), points)
            for one in (run, *([baseline] if baseline else []))
            for number, (key, name) in enumerate(keys)
            if (points := one.metrics.series.get(key))
        ]
        if given:
            made.append(_chart(title, given))
    return made


def page_values(run: Run, baseline: Run | None) -> dict[str, Any]:
    """Returns what `run_body.html.jinja` shows of a run, beside a baseline if there is one."""
    return {
        "run": run,
        "baseline": baseline,
        "charts": charts(run, baseline),
        "size": (WIDTH, HEIGHT),
        "margins": (LEFT, BOTTOM, RIGHT),
        "cell": CELL,
        "heat": heat(run.experts) if run.experts else None,
        "summary": summary(run, baseline),
        "summary_json": json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else "",
        "recipe": differences(run.recipe, baseline.recipe if baseline else {}),
    }


def figure(value: float) -> str:
    """A value with four digits."""
    return f"{value:.4g}"


def _chart(title: str, given: Sequence[tuple[str, str, Sequence[tuple[int, float]]]]) -> Chart:
    steps = [step for _, _, points in given for step, _ in points]
    values = [value for _, _, points in given for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(step: int, value: float) -> tuple[float, float]:
        along = (step - first) / (last - first) if last > first else 0.5
        # Scaled before the difference: two values near the limits of a float have none.
        above = (value / 2 - low / 2) / (high / 2 - low / 2)
        return round(LEFT + wide * along, 1), round(TOP + tall * (1 - above), 1)

    curves = []
    for name, look, points in given:
        placed = [at(*point) for point in _thinned(points)]
        least, most = min(points, key=lambda one: one[1]), max(points, key=lambda one: one[1])
        curves.append(
            Curve(
                name,
                look,
                " ".join(f"{x},{y}" for x, y in placed),
                placed if len(placed) < 30 else [],
                figure(points[0][1]),
                figure(points[-1][1]),
                f"{figure(least[1])} at step {least[0]}",
                f"{figure(most[1])} at step {most[0]}",
            )
        )
    up = [(at(first, value)[1], figure(value)) for value in (low, low / 2 + high / 2, high)]
    across = [(float(LEFT), str(first)), (float(WIDTH - RIGHT), str(last))] if last > first else [(LEFT, str(first))]
    words = f"{title} over steps {first} to {last}. " + " ".join(
        f"{curve.name}: from {curve.first} to {curve.last}, least {curve.least}, most {curve.most}." for curve in curves
    )
    return Chart(title, curves, up, across, words)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_MOST_POINTS` points: of each stretch its least and its largest value, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretches = _MOST_POINTS // 2
    kept: list[tuple[int, float]] = []
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return kept


def heat(experts: Experts) -> Heat:
    """Returns the heat map of a profile of experts."""
    share = experts.share
    most = max((value for row in share for value in row), default=0.0)
    paths: dict[int, list[str]] = {}
    for layer, row in enumerate(share):
        for expert, value in enumerate(row):
            level = 0 if most <= 0 else max(0, min(LEVELS - 1, int(value / most * LEVELS)))
            paths.setdefault(level, []).append(f"M{LEFT + expert * CELL},{TOP + layer * CELL}h{CELL}v{CELL}h-{CELL}z")
    columns, layers = len(share[0]), len(share)
    every = max(1, columns // 16), max(1, layers // 32)
    return Heat(
        LEFT + columns * CELL + RIGHT,
        TOP + layers * CELL + BOTTOM,
        [(level, "".join(parts)) for level, parts in sorted(paths.items())],
        [(LEFT + expert * CELL, TOP + layer * CELL) for layer, expert in sorted(experts.chosen)],
        [_layer(number, row, experts) for number, row in enumerate(share)],
        most,
        [(LEFT + expert * CELL + CELL // 2, expert) for expert in range(0, columns, every[0])],
        [(TOP + layer * CELL + CELL - 2, layer) for layer in range(0, layers, every[1])],
    )


def _layer(number: int, row: Sequence[float], experts: Experts) -> tuple[int, str, str, str]:
    busiest, idlest = max(range(len(row)), key=row.__getitem__), min(range(len(row)), key=row.__getitem__)
    trained = [str(expert) for layer, expert in sorted(experts.chosen) if layer == number]
    return (
        number,
        f"{busiest} ({100 * row[busiest]:.1f} %)",
        f"{idlest} ({100 * row[idlest]:.1f} %)",
        ", ".join(trained) or "none",
    )


def summary(run: Run, baseline: Run | None) -> list[tuple[str, str, str | None]]:
    """Returns the last value of every series: (name, in the run, in the baseline)."""

    def last(one: Run | None, name: str) -> str | None:
        points: Mapping[str, Sequence[tuple[int, float]]] = one.metrics.series if one else {}
        return figure(points[name][-1][1]) if points.get(name) else None

    names = sorted({*run.metrics.series, *(baseline.metrics.series if baseline else ())})
    return [(name, last(run, name) or "-", last(baseline, name)) for name in names]
