"""A folder of training runs and reports, read for the page at `/ui` and for bundles; nothing in it is trusted.

Links are not followed, sizes are bounded, and a file that cannot be read is a sentence on the page. A run is known by
what training leaves (`train/stages/core.py`): `recipe.json` at its start, `metrics.jsonl`, and `run.json` at its end. A
report is a `report.md` (`contracts/report.py`).
"""

import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from mixfuse.contracts.bounded_json import parse_object
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.report import flat
from mixfuse.fusion.http.statuses import RequestError

METRICS, RECIPE, DONE, EXPERTS, REPORT = "metrics.jsonl", "recipe.json", "run.json", "experts.json", "report.md"
PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}
"""What a report's pictures end in, and their types."""

_DEEPEST = 6
_MOST_FOLDERS, _MOST_LISTED = 5000, 300
_MOST_BYTES, _MOST_METRICS, _GLANCE = 4 << 20, 16 << 20, 1 << 16
_LONGEST_LINE = 1 << 16
_BIGGEST = 1e300
_MOST_LAYERS, _MOST_EXPERTS = 256, 512
# A run that has been silent for so long, and for so many of its own steps, has ended without a word.
_SILENT_S = 300.0
_SILENT_STEPS = 20


@dataclass(frozen=True)
class Found:
    """A run or a report in the folder.

    Attributes:
        path: Below the folder, with slashes.
        kind: What it is: `run`, `experts` (a profile of experts alone) or `report`.
        changed: When it last changed, in seconds since 1970.
    """

    path: str
    kind: str
    changed: float


@dataclass(frozen=True)
class Metrics:
    """What `metrics.jsonl` says.

    Attributes:
        series: Name → (step, value), ascending by step; finite values only.
        last_step: The last step that was logged; None without one.
        cut: Bytes at the beginning of the file that were too many to read.
        unreadable: Lines that hold no row.
        not_finite: Values that are no numbers (NaN, infinity), by name.
        seconds: The usual time between two steps; None where it is not known.
    """

    series: Mapping[str, Sequence[tuple[int, float]]]
    last_step: int | None
    cut: int
    unreadable: int
    not_finite: Mapping[str, int]
    seconds: float | None


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        path: Below the folder.
        state: `finished`, `running` or `cut off`.
        changed: When it last changed, in seconds since 1970.
        recipe: Its recipe; {} if there is none that can be read.
        summary: Of `run.json`, without the recipe; {} until the run is finished.
        metrics: What it logged.
        steps: The steps that it has when it is finished; None where only the run knows.
        experts: The share of gate weight by layer and expert, and what was chosen; None if it was not measured.
        problems: What could not be read, in sentences.
    """

    path: str
    state: str
    changed: float
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Metrics
    steps: int | None
    experts: "Experts | None"
    problems: Sequence[str]


@dataclass(frozen=True)
class Experts:
    """Which experts the data of a recipe is routed to.

    Attributes:
        share: The share of gate weight, a row for each layer.
        chosen: (layer, expert) that are trained.
        tokens: How many tokens were measured.
    """

    share: Sequence[Sequence[float]]
    chosen: frozenset[tuple[int, int]]
    tokens: int | None


class RunsFolder:
    """A folder of runs and reports.

    Args:
        root: The folder; it may be a link itself, or not be there yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self) -> tuple[list[Found], bool]:
        """Returns what is in the folder, newest first, and whether that is all of it."""
        found: list[Found] = []
        folders, looked = [(self.root, "", 0)], 0
        while folders and looked < _MOST_FOLDERS:
            folder, path, depth = folders.pop()
            looked += 1
            names: dict[str, float] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or not entry.name.isprintable():
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            below = f"{path}/{entry.name}" if path else entry.name
                            if depth < _DEEPEST:
                                folders.append((folder / entry.name, below, depth + 1))
                        elif entry.is_file(follow_symlinks=False):
                            names[entry.name] = entry.stat(follow_symlinks=False).st_mtime
            except OSError:  # gone meanwhile, or not ours to read: the others can be shown
                continue
            if path and (kind := _kind(names)):
                files = (METRICS, RECIPE, DONE, EXPERTS, REPORT)
                found.append(Found(path, kind, max(names[name] for name in files if name in names)))
        found.sort(key=lambda one: (-one.changed, one.path))
        return found[:_MOST_LISTED], not folders and len(found) <= _MOST_LISTED

    def kind(self, path: str) -> str:
        """Returns what a folder holds, as `Found.kind` says.

        Raises:
            RequestError: It is no folder below this one, or holds neither a run nor a report.
        """
        with self._folder(path) as handle:
            names = {
                name: 0.0 for name in (METRICS, RECIPE, DONE, EXPERTS, REPORT) if _regular(name, handle) is not None
            }
        kind = _kind(names)
        if kind is None:
            raise _missing(path)
        return kind

    def run(self, path: str, *, brief: bool = False) -> Run:
        """Returns a run.

        Args:
            path: Below the folder.
            brief: Read the end of its metrics only.

        Raises:
            RequestError: There is no such folder.
        """
        problems: list[str] = []
        with self._folder(path) as handle:
            states = [_regular(name, handle) for name in (METRICS, RECIPE, DONE)]
            changed = max((state.st_mtime for state in states if state is not None), default=0.0)
            metrics = self._metrics(handle, _GLANCE if brief else _MOST_METRICS, problems)
            done = _object(DONE, handle, problems)
            recipe = _mapping(_object(RECIPE, handle, problems)) or _mapping(done.get("recipe"))
            experts = None if brief else _experts(_object(EXPERTS, handle, problems))
        if metrics.cut and not brief:
            problems.append(f"{METRICS} is long: its first {metrics.cut >> 20} MiB are not shown.")
        if metrics.unreadable and not (brief and metrics.cut):
            problems.append(f"{metrics.unreadable} lines of {METRICS} hold no row.")
        problems += [
            f"{name} was no number (NaN or infinite) {times} times." for name, times in metrics.not_finite.items()
        ]
        silent = max(_SILENT_S, _SILENT_STEPS * (metrics.seconds or 0.0))
        running = time.time() - changed < silent
        trained = any(state is not None for state in states)  # or it is a profile of experts alone
        state = "finished" if done or not trained else "running" if running else "cut off"
        summary = {name: value for name, value in done.items() if name != "recipe"}
        steps = _whole(_mapping(done.get("metrics")).get("steps"))
        steps = steps if steps is not None else _whole(_mapping(recipe.get("optimizer")).get("steps"))
        return Run(path, state, changed, recipe, summary, metrics, steps, experts, problems)

    def text(self, path: str, name: str) -> str:
        """Returns a text file of a folder, as far as `_MOST_BYTES`.

        Raises:
            RequestError: There is none.
        """
        return self.content(path, name).decode(errors="replace")

    def content(self, path: str, name: str) -> bytes:
        """Returns a file of a folder.

        Raises:
            RequestError: There is none, it is no regular file, or too large.
        """
        with self._folder(path) as handle:
            content = _content(name, handle, _MOST_BYTES + 1)
        if content is None:
            raise _missing(f"{path}/{name}")
        if len(content) > _MOST_BYTES:
            message = f"{name} is larger than {_MOST_BYTES >> 20} MiB; open it in another program"
            raise RequestError(message, code="too_large", status=422)
        return content

    def _metrics(self, handle: int, most: int, problems: list[str]) -> Metrics:
        state = _regular(METRICS, handle)
        if state is None:
            return _rows(b"", 0)
        with _opened(METRICS, handle) as stream:
            if stream is None:
                problems.append(f"{METRICS} cannot be read.")
                return _rows(b"", 0)
            cut = max(0, state.st_size - most)
            stream.seek(cut)
            content = stream.read(most)
        if cut:  # what is left of the line in the middle of which it was cut
            first, _, content = content.partition(b"\n")
            cut += len(first) + 1
        return _rows(content, cut)

    @contextmanager
    def _folder(self, path: str) -> Iterator[int]:
        """Opens a folder below this one, part by part: a link on the way is no folder, whoever puts it there when.

        Raises:
            RequestError: There is none.
        """
        parts = path.split("/")
        if not path or len(path) > 4096 or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise _missing(path)
        handle = -1
        try:
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for part in parts:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = below
        except (OSError, UnicodeEncodeError):
            if handle >= 0:
                os.close(handle)
            raise _missing(path) from None
        try:
            yield handle
        finally:
            os.close(handle)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str | None, str | None]]:
    """Returns what differs between two recipes: (key, in the one, in the other); None where it is not set."""
    left, right = dict(flat(dict(one))), dict(flat(dict(other)))
    keys = [*left, *(key for key in right if key not in left)]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def _kind(names: Mapping[str, float]) -> str | None:
    if METRICS in names or RECIPE in names or DONE in names:
        return "run"
    return "report" if REPORT in names else "experts" if EXPERTS in names else None


def _missing(path: str) -> RequestError:
    return RequestError(f"there is no run or report {path[:200]!r} in the folder of runs", code="not_found", status=404)


def _regular(name: str, handle: int) -> os.stat_result | None:
    try:
        state = os.stat(name, dir_fd=handle, follow_symlinks=False)
    except (OSError, ValueError):
        return None
    return state if stat.S_ISREG(state.st_mode) else None


@contextmanager
def _opened(name: str, handle: int) -> Iterator[BinaryIO | None]:
    """Opens a regular file of a folder; None if it is none, or cannot be read."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        yield None
        return
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
    except (OSError, UnicodeEncodeError):
        yield None
        return
    with os.fdopen(opened, "rb") as stream:
        yield stream if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else None


def _content(name: str, handle: int, most: int) -> bytes | None:
    with _opened(name, handle) as stream:
        return None if stream is None else stream.read(most)


def _object(name: str, handle: int, problems: list[str]) -> dict[str, Any]:
    """Returns the JSON object of a file; {} if there is none or it cannot be read, which is a problem."""
    content = _content(name, handle, _MOST_BYTES + 1)
    if content is None:
        return {}
    if len(content) > _MOST_BYTES:
        problems.append(f"{name} is larger than {_MOST_BYTES >> 20} MiB; it is not shown.")
        return {}
    try:
        return parse_object(content, name)
    except MixfuseError as error:
        problems.append(f"{error}.")
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if fine else None


def _number(value: Any) -> float | None:
    """A value as a float, which may be NaN or infinite; None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return math.inf if abs(value) >= _BIGGEST else float(value)  # an int may be too large for a float


@lru_cache(maxsize=8)
def _rows(content: bytes, cut: int) -> Metrics:
    """Reads rows as `train/stages/training_metrics.py` writes them; the last line of a live run may be half a row."""
    series: dict[str, dict[int, float]] = {}
    not_finite: dict[str, int] = {}
    times: dict[int, float] = {}
    unreadable, last = 0, None
    lines = content.split(b"\n")
    if lines and lines[-1]:
        lines.pop()  # it is being written
    for line in lines:
        if not line.strip():
            continue
        row = _row(line)
        step = _whole(row.get("step"))
        if step is None:
            unreadable += 1
            continue
        last = step if last is None else max(last, step)
        for name, given in row.items():
            value = _number(given)
            if value is None or name == "step":
                continue
            if not math.isfinite(value):
                not_finite[name] = not_finite.get(name, 0) + 1
            elif name == "time":
                times[step] = value
            else:
                series.setdefault(name, {})[step] = value
    ordered = {name: sorted(points.items()) for name, points in series.items()}
    return Metrics(ordered, last, cut, unreadable, not_finite, _pace(times))


def _row(line: bytes) -> dict[str, Any]:
    if len(line) > _LONGEST_LINE:
        return {}
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _pace(times: Mapping[int, float]) -> float | None:
    """The median of the seconds that a step took."""
    ordered = sorted(times.items())
    gaps = sorted(
        (later - earlier) / (step - before) for (before, earlier), (step, later) in pairwise(ordered) if later > earlier
    )
    return gaps[len(gaps) // 2] if gaps else None


def _experts(record: Mapping[str, Any]) -> Experts | None:
    share = record.get("gate_share")
    if not isinstance(share, list) or not 0 < len(share) <= _MOST_LAYERS:
        return None
    rows = [[_number(value) for value in row] if isinstance(row, list) else [] for row in share]
    width = len(rows[0])
    if not 0 < width <= _MOST_EXPERTS or any(len(row) != width for row in rows):
        return None
    whole = [[value if value is not None and math.isfinite(value) else 0.0 for value in row] for row in rows]
    chosen = record.get("chosen")
    framed = {
        (layer, expert)
        for layer, numbers in enumerate(chosen if isinstance(chosen, list) else [])
        for expert in (numbers if isinstance(numbers, list) else [])
        if isinstance(expert, int) and 0 <= expert < width and layer < len(rows)
    }
    return Experts(whole, frozenset(framed), _whole(record.get("tokens")))
