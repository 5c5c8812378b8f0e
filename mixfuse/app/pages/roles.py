"""Roles: what serves each of them, its history, parity, manifest and card; swaps, gates, rollbacks and pins."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection
from starlette.responses import Response

from mixfuse.app import roles_store
from mixfuse.app.roles_commands import seconds, share
from mixfuse.contracts.adapter import Manifest, read_manifest
from mixfuse.contracts.bounded_json import open_regular
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.model_card import CARD
from mixfuse.contracts.report import flat
from mixfuse.contracts.strict_yaml import override
from mixfuse.fusion.http.inside import Inside
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import Page, Visit

_EVENTS = 50
_MOST_CARD = 1 << 20
_UNKNOWN = {"in_flight": None, "loaded": None, "staged": None, "problem": None, "gate": None}
"""What only a running server knows of a role."""


async def show(visit: Visit) -> Response:
    """Shows what serves each role."""
    return await visit.page("roles.html.jinja", rows=await _rows(visit))


async def one(visit: Visit) -> Response:
    """Shows a role: its gate, what can be done with it, its adapter and its history."""
    role = visit.request.path_params["role"]
    row = next((row for row in await _rows(visit) if row["role"] == role), None)
    if row is None:
        raise RequestError(f"there is no role {role[:100]!r}", code="not_found", status=404)

    def events(connection: Connection) -> list[roles_store.Event]:
        return roles_store.history(connection, role=role, limit=_EVENTS)

    adapter = await asyncio.to_thread(_adapter, row["directory"])
    return await visit.page(
        "role.html.jinja", row=row, history=await visit.read(events), gate=_figures(row["gate"]), **adapter
    )


async def swap(visit: Visit) -> Response:
    """Swaps a role, through a gate if one is asked for: as `mixfuse roles swap` does."""
    form = {name: value.strip() for name, value in (await visit.form()).items()}
    given = {name: form.get(name, "") for name in ("shadow", "canary", "for", "requests", "timeout", "limits")}
    try:
        body: dict[str, Any] = {"directory": form.get("directory", "")}
        body |= {name: _count(name, given[name]) for name in ("shadow", "requests") if given[name]}
        body |= {"canary": share(given["canary"])} if given["canary"] else {}
        body |= {"for_s": seconds(given["for"])} if given["for"] else {}
        body |= {"timeout_s": seconds(given["timeout"])} if given["timeout"] else {}
        body |= {"limits": override({}, given["limits"].split())} if given["limits"] else {}
    except MixfuseError as error:
        raise RequestError(str(error), code="invalid_value") from None
    if not body["directory"]:
        raise RequestError("name the adapter directory, as a path on the server", code="invalid_value")
    return await _do(visit, "PUT", "", body)


async def stop(visit: Visit) -> Response:
    """Stops a gate; the old revision serves on."""
    return await _do(visit, "DELETE", "/gate")


async def rollback(visit: Visit) -> Response:
    """Returns a role to its previous adapter."""
    return await _do(visit, "POST", "/rollback")


async def pin(visit: Visit) -> Response:
    """Keeps a role's adapter loaded."""
    return await _do(visit, "PUT", "/pin")


async def unpin(visit: Visit) -> Response:
    """Lets a role's adapter make room."""
    return await _do(visit, "DELETE", "/pin")


async def _do(visit: Visit, method: str, path: str, body: Any = None) -> Response:
    """Asks the admin API with the visitor's key; it checks the key and everything else."""
    role = quote(visit.request.path_params["role"], safe="")
    await visit.call(method, f"/admin/roles/{role}{path}", body)
    return visit.to(f"/roles/{role}")


async def _rows(visit: Visit) -> list[dict[str, Any]]:
    """Returns the roles as `GET /admin/roles` lists them; of a page that stands alone, as the database has them.

    Raises:
        RequestError: The visitor has an API key: roles are not of one key.
    """
    visit.admin_only("roles")
    if not visit.inside.reads:
        listed = await visit.call("GET", "/admin/roles")
        return list(listed["roles"])
    entries = await visit.read(roles_store.read)
    return [asdict(entry) | _UNKNOWN for _, entry in sorted(entries.items())]


def _count(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise RequestError(f"{name!r} must be a whole number, not {value[:40]!r}", code="invalid_value", param=name)
    return int(value)


def _adapter(directory: str | None) -> dict[str, Any]:
    """Returns the manifest and the card of an adapter directory, or why they cannot be shown."""
    manifest: Manifest | None = None
    card = problem = None
    if directory is not None:
        try:
            manifest = read_manifest(Path(directory))
            with open_regular(Path(directory, CARD), follow=False) as stream:
                card = stream.read(_MOST_CARD).decode(errors="replace")
        except MixfuseError as error:
            problem = str(error)
    text = manifest.model_dump_json(indent=2) if manifest else None
    return {"manifest": manifest, "manifest_json": text, "card": card, "problem": problem}


def _figures(gate: Mapping[str, Any] | None) -> list[tuple[str, list[tuple[str, str, str]], list[tuple[str, str]]]]:
    """Returns the figures of a gate, by phase: (its name, (figure, serving, staged) rows, other figures)."""
    phases = []
    for name in ("shadow", "canary"):
        figures = gate[name] if gate else None
        if figures:
            old, new = dict(flat(figures["old"])), dict(flat(figures["new"]))
            rows = [(key, old.get(key, ""), value) for key, value in new.items()]
            others = [(key, value) for key, value in flat(figures) if key.partition(".")[0] not in ("old", "new")]
            phases.append((name, rows, others))
    return phases


def _has_roles(inside: Inside) -> bool:
    return inside.roles or inside.reads


PAGE = Page(
    "Roles",
    order=45,
    gets={"": show, "/{role}": one},
    posts={
        "/{role}/swap": swap,
        "/{role}/stop": stop,
        "/{role}/rollback": rollback,
        "/{role}/pin": pin,
        "/{role}/unpin": unpin,
    },
    shown=_has_roles,
    alone=True,
    for_admin=True,
)
