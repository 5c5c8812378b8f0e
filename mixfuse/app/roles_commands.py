"""`mixfuse roles …`: shows and changes which adapter serves each role of a running server."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixfuse.app.admin_api import GateReport, SwapRequest
from mixfuse.app.client import AdminClient
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import resolved
from mixfuse.contracts.strict_yaml import validate
from mixfuse.serve.roles import BASE
from mixfuse.serve.swap import Swap

_POLL_S = 0.5  # between two looks at a gate


def list_roles(url: str, *, as_json: bool = False) -> None:
    """`mixfuse roles list`: prints the revision that serves each role.

    Raises:
        MixfuseError: No server answers at `url`, or it has no roles.
    """
    rows = AdminClient(url).roles()
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("role", "revision", "since", "adapter", "in flight", "")
    for row in rows:
        notes = ["pinned"] if row.pinned else []
        notes += [] if row.loaded else ["not loaded"]
        notes += [row.doing] if row.doing else []
        if row.staged:
            notes.append(f"{row.staged.revision} staged" + (f", {row.staged.share:.0%}" if row.staged.share else ""))
        notes += [row.problem] if row.problem else []
        if gate := row.gate:
            notes.append(_progress(gate) if gate.under_way else f"{gate.new} {gate.state}")
        table.add_row(
            row.role,
            row.revision or "-",
            _time(row.since),
            row.directory or "(the base)",
            str(row.in_flight),
            "; ".join(notes),
        )
    Console(markup=False, emoji=False).print(table)


def swap_role(url: str, role: str, directory: Path, *, as_json: bool = False) -> None:
    """`mixfuse roles swap`: prints the old and the new revision.

    Raises:
        MixfuseError: No server answers, or the swap was refused; the old revision serves on.
    """
    client = AdminClient(url)
    with _shown(client, role):
        swap = client.swap(role, resolved(directory))
    _print_swap(swap, as_json)


@contextmanager
def _shown(client: AdminClient, role: str) -> Iterator[None]:
    """Shows, on a terminal, what the server does while the block waits for a swap."""
    console, ended, began = Console(stderr=True), Event(), time.monotonic()

    def watch() -> None:
        with console.status(Text(f"{role}: asking the server")) as status:
            while not ended.wait(_POLL_S):
                try:
                    doing = client.role(role).doing or "waiting for requests on the old revision"
                except MixfuseError as error:
                    doing = str(error)
                status.update(Text(f"{role}: {doing} ({time.monotonic() - began:.0f} s)"))

    watching = Thread(target=watch, daemon=True) if console.is_terminal else None
    try:
        if watching is not None:
            watching.start()
        yield
    except KeyboardInterrupt:
        print(f"{role}: the server goes on with the swap; see: mixfuse roles list", file=sys.stderr)
        raise
    finally:
        ended.set()
        if watching is not None:
            watching.join()


def swap_through_gate(url: str, role: str, directory: Path, gate: dict[str, Any], *, as_json: bool = False) -> None:
    """`mixfuse roles swap --shadow, --canary`: shows the gate's progress until it ends. Ctrl-C stops the gate.

    Args:
        url: The server's URL.
        role: The role.
        directory: The adapter directory.
        gate: The other keys of `mixfuse.app.admin_api.SwapRequest`.
        as_json: Print the gate's last state as JSON instead of tables.

    Raises:
        MixfuseError: No server answers, the adapter was refused, or it did not pass the gate; the old revision serves
            on.
    """
    client = AdminClient(url)
    settings = {key: value for key, value in gate.items() if value is not None}
    request = validate({"directory": resolved(directory), **settings}, SwapRequest, source="roles swap")
    report = client.begin_gate(role, request)
    try:
        with Console(stderr=True).status("") as status:
            while report.under_way:
                status.update(Text(f"{role}: {report.new}: {_progress(report)}"))
                time.sleep(_POLL_S)
                report = client.role(role).gate or report
    except KeyboardInterrupt:
        stopped = client.stop_gate(role) or report
        print(f"{role}: {stopped.state}: {stopped.reason}", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        for name, figures in (("shadow", report.shadow), ("canary", report.canary)):
            if figures is not None:
                Console(markup=False, emoji=False).print(_figures(f"{role}: {name}", figures))
    if report.state != "promoted":
        raise MixfuseError(f"{role}: {report.reason}", kind="gate")
    if not as_json:
        print(f"{role}: {report.old or BASE} -> {report.new} ({report.reason})")


def seconds(text: str) -> float:
    """Parses a length of time: `90s`, `10m`, `2h`, or a number of seconds.

    Raises:
        MixfuseError: The text is something else.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # NaN compares false
        raise MixfuseError(f"{text!r} is no length of time; write 90s, 10m or 2h")
    return value


def share(text: str) -> float:
    """Parses a share: `10%` or `0.1`.

    Raises:
        MixfuseError: The text is something else.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise MixfuseError(f"{text!r} is no share of requests; write 10% or 0.1")
    return value


def roll_role_back(url: str, role: str, *, as_json: bool = False) -> None:
    """`mixfuse roles rollback`: prints the old and the new revision.

    Raises:
        MixfuseError: As for `swap_role`, or nothing served the role before.
    """
    client = AdminClient(url)
    with _shown(client, role):
        swap = client.rollback(role)
    _print_swap(swap, as_json)


def roll_stored_role_back(where: str, role: str, *, as_json: bool = False) -> None:
    """`mixfuse roles rollback --db`: changes the shared record only, for when no server runs.

    Raises:
        MixfuseError: There is no such database, or nothing served the role before.
    """
    from mixfuse.app.roles_store import roll_back
    from mixfuse.contracts.database import opened

    with opened(where, create=False) as database:
        entry = roll_back(database, role, "mixfuse roles rollback")
    if as_json:
        print(json.dumps(asdict(entry)))
    else:
        print(f"{role}: {entry.revision or BASE} in the role table; servers follow, or start with it")


def show_history(url: str, role: str, *, limit: int = 20, as_json: bool = False) -> None:
    """`mixfuse roles history`: prints the events of a role, newest first.

    Raises:
        MixfuseError: No server answers, or it has no such role.
    """
    events = AdminClient(url).history(role, limit=limit)
    if as_json:
        print(json.dumps([asdict(event) for event in events]))
        return
    table = Table("when", "why", "from", "to", "outcome", "by", "adapter")
    for event in events:
        table.add_row(
            _time(event.at),
            event.why,
            event.old or BASE,
            event.new or ("?" if event.directory else BASE),
            event.outcome if event.error is None else f"{event.outcome}: {event.error}",
            event.gateway,
            event.directory or "",
        )
    Console(markup=False, emoji=False).print(table)


def pin_role(url: str, role: str, pinned: bool, *, as_json: bool = False) -> None:
    """`mixfuse roles pin` and `unpin`.

    Raises:
        MixfuseError: No server answers, it has no such role, or every place would be pinned.
    """
    row = AdminClient(url).pin(role, pinned)
    if as_json:
        print(json.dumps(asdict(row)))
    else:
        print(f"{role}: {'stays loaded' if row.pinned else 'may make room for others'}")


def _print_swap(swap: Swap, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(swap)))
    elif swap.old == swap.new:
        print(f"{swap.role}: revision {swap.new} is serving already")
    else:
        print(
            f"{swap.role}: {swap.old or BASE} -> {swap.new or BASE} ({swap.drained} requests finished on the old one)"
        )


def _progress(gate: GateReport) -> str:
    figures = {"shadow": gate.shadow, "canary": gate.canary}.get(gate.state)
    if figures is None:
        return "waits for the old one's last requests"
    wanted = gate.asked.get("shadow") if gate.state == "shadow" else gate.asked.get("requests")
    until = f"of {wanted} requests" if wanted else f"requests in {gate.asked['for_s']:g} s"
    return f"{gate.state}, {figures['new']['requests']} {until}"


def _figures(title: str, figures: dict[str, Any]) -> Table:
    """A table of both revisions' figures, side by side."""
    table = Table("", "old", "new", title=title, title_justify="left")
    for name, label in (
        ("requests", "requests"),
        ("calls", "calls"),
        ("failures", "failed calls"),
        ("p50_ms", "p50, ms"),
        ("p95_ms", "p95, ms"),
        ("pairs", "pairs judged"),
        ("consistency", "alike in both orders"),
        ("parse_failures", "unreadable verdicts"),
        ("liked", "answers liked"),
        ("disliked", "answers disliked"),
        ("tokens", "tokens"),
        ("cost", "dollars"),
    ):
        values = [figures[side][name] for side in ("old", "new")]
        if any(values):
            table.add_row(label, *("-" if value is None else f"{value:.4g}" for value in values))
    for name, label in (
        ("agreement", "same winner"),
        ("answer_agreement", "same answer"),
        ("preference", "new one preferred"),
    ):
        if figures[name] is not None:
            table.add_row(label, "", f"{figures[name]:.2f}")
    if figures["spent_tokens"]:
        table.caption = f"the comparison took {figures['spent_tokens']} tokens, ${figures['spent_cost']:.4g}"
    return table


def _time(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds").removesuffix("+00:00")
