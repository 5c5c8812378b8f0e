"""The client of the admin API: lists, swaps, rolls back and pins the roles of a running server."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from mixfuse.app.admin_api import GateReport, RoleRow, SwapRequest
from mixfuse.app.roles_store import Event
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.http.keys import ADMIN_KEY
from mixfuse.serve.swap import Swap

Body = TypeVar("Body")

_ROLE, _ROLES = TypeAdapter(RoleRow), TypeAdapter(list[RoleRow])
_SWAP = TypeAdapter(Swap)
_GATE = TypeAdapter(GateReport)
_LAST_GATE: TypeAdapter[GateReport | None] = TypeAdapter(GateReport | None)
_HISTORY = TypeAdapter(list[Event])
_READ_S = 30.0
_CHANGE_S = 600.0  # a swap answers once the old revision is drained


class RefusedError(MixfuseError):
    """The server answered with a status of 400 to 499: it is up, and will not do this."""


class ServerFailedError(MixfuseError):
    """The server answered with a status of 500 or above: it is broken, or its engine or its database is away."""


@dataclass(frozen=True)
class AdminClient:
    """The admin API of one server. The admin key is read from the environment.

    Every method raises a MixfuseError if no mixfuse server answers at `url`, a RefusedError with the server's message
    if it refuses, and a ServerFailedError if it fails. Redirects are not followed: they would carry the key away.

    Attributes:
        url: The server's base URL, without `/v1`.
    """

    url: str

    def roles(self) -> list[RoleRow]:
        """Returns what serves each role, the base first."""
        return self._read(_ROLES, self._send("GET", "", timeout_s=_READ_S), "roles")

    def role(self, name: str) -> RoleRow:
        """Returns what serves one role.

        Raises:
            MixfuseError: The server has no such role.
        """
        for row in self.roles():
            if row.role == name:
                return row
        raise MixfuseError(f"{self.url} serves no role {name!r}; name it in its config's roles", kind="role")

    def swap(self, role: str, directory: Path) -> Swap:
        """Serves a role by the adapter in `directory`; returns once the old revision is drained and unloaded."""
        return self._read(_SWAP, self._send("PUT", f"/{role}", {"directory": str(directory)}))

    def begin_gate(self, role: str, request: SwapRequest) -> GateReport:
        """Stages an adapter behind a gate and returns at once. `role` shows how the gate goes."""
        body = request.model_dump(mode="json", exclude_none=True)
        return self._read(_GATE, self._send("PUT", f"/{role}", body), "gate")

    def stop_gate(self, role: str) -> GateReport | None:
        """Stops the role's gate, if one is under way; returns the role's latest gate."""
        return self._read(_LAST_GATE, self._send("DELETE", f"/{role}/gate"), "gate")

    def rollback(self, role: str) -> Swap:
        """Serves a role by the revision before; returns once the present one is drained and unloaded."""
        return self._read(_SWAP, self._send("POST", f"/{role}/rollback"))

    def history(self, role: str, *, limit: int = 20) -> list[Event]:
        """Returns the role's newest events, newest first."""
        answer = self._send("GET", f"/{role}/history?limit={limit}", timeout_s=_READ_S)
        return self._read(_HISTORY, answer, "history")

    def pin(self, role: str, pinned: bool) -> RoleRow:
        """Keeps a role's adapter loaded, or stops keeping it."""
        return self._read(_ROLE, self._send("PUT" if pinned else "DELETE", f"/{role}/pin"))

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = _CHANGE_S
    ) -> dict[str, Any]:
        """Returns the JSON object of a successful answer."""
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(ADMIN_KEY)) else {}
        url = f"{self.url.rstrip('/')}/admin/roles{path}"
        try:
            response = httpx.request(method, url, json=body, headers=headers, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise MixfuseError(
                f"no mixfuse server answers at {self.url} ({error}); start one with: mixfuse serve CONFIG",
                kind="unreachable",
            ) from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict):
            return dict(answer)
        failure = answer.get("error") if isinstance(answer, dict) else None
        message = failure.get("message") if isinstance(failure, dict) else None
        kind = str(failure.get("type", "")) if isinstance(failure, dict) else ""
        if response.is_server_error:
            what = message or f"the server at {self.url} failed (status {response.status_code}); see its log"
            raise ServerFailedError(what, kind=kind or "server_failed")
        if response.is_client_error and method == "GET" and not path:
            raise RefusedError(
                f"{self.url} serves no roles (it answered with status {response.status_code}); start a server with: "
                "mixfuse serve CONFIG",
                kind="no_roles",
            )
        if response.is_client_error and message:
            raise RefusedError(message, kind=kind or "invalid_request")
        raise self._no_server(response.status_code)

    def _read(self, body: TypeAdapter[Body], answer: dict[str, Any], key: str | None = None) -> Body:
        """Reads an answer, or the part of it under `key`."""
        try:
            return body.validate_python(answer if key is None else answer[key])
        except (KeyError, ValidationError):
            raise self._no_server(200) from None

    def _no_server(self, status: int) -> MixfuseError:
        return MixfuseError(f"{self.url} is no mixfuse server of this version (it answered with status {status})")
