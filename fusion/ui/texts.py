"""How the page writes figures, times and long texts: its templates' environment and filters."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mixfuse.contracts.trace import time_in_utc

_MOST_CHARS = 20_000


def dollars(cost: float) -> str:
    """An amount of money, with two digits that count: $12.00, $0.0012, $0.000072."""
    if not 0 < cost < 1:
        return "$0" if not cost else f"${cost:.2f}"
    return f"${cost:.{min(12, 1 - math.floor(math.log10(cost)))}f}"


def duration(ms: float) -> str:
    """A time: 12 ms, 3.4 s, 2 min 5 s."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def moment(at: float) -> str:
    """A time of day, in UTC: 2026-05-01 12:00:00."""
    return time_in_utc(at).strftime("%Y-%m-%d %H:%M:%S")


def percent(share: float) -> str:
    """A probability: 93 %."""
    return f"{100 * share:.0f} %"


def count(number: float) -> str:
    """A number with thousands apart: 12 345."""
    return f"{number:,.0f}".replace(",", "\u202f")


def shortened(value: str, most: int = _MOST_CHARS) -> str:
    """A text of at most so many characters; what is left out is counted."""
    return value if len(value) <= most else f"{value[:most]}… [{len(value) - most} more characters]"


def preview(value: str, head: int = 60, tail: int = 60) -> str:
    """The beginning and the end of a text in one line: an answer often ends with what matters."""
    if len(value) <= head + tail + 3:
        return " ".join(value.split())
    return f"{' '.join(value[:head].split())} … {' '.join(value[-tail:].split())}"


def as_json(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


FILTERS: dict[str, Callable[..., Any]] = {
    "dollars": dollars,
    "duration": duration,
    "moment": moment,
    "percent": percent,
    "count": count,
    "shortened": shortened,
    "preview": preview,
    "as_json": as_json,
}


def environment(folders: Sequence[Path]) -> jinja2.Environment:
    """Returns what renders the templates of these folders, and of this room: everything is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= FILTERS
    return made
