"""What the gateway lends to the page at `/ui`."""

from collections.abc import Callable
from dataclasses import dataclass

from mixfuse.contracts.database import Database
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.keys import KeyRing
from mixfuse.fusion.store.traces import TraceStore

WATCH = "mixfuse.watch"
"""The key in a request's ASGI scope of what is told of each call as it ends; no request from outside can have it."""


@dataclass(frozen=True)
class Inside:
    """The parts of a running gateway that pages read; what changes anything goes through the API instead.

    Attributes:
        config: The gateway's config.
        database: Traces, keys and roles.
        keys: Checks an `Authorization` header.
        traces: The stored traces.
        owner: `Authorization` header → the id of the API key whose traces it may see, None for all; raises as
            `/v1/traces` does.
        models: Returns the names that a request can be sent to.
        roles: Whether an engine is beside the gateway, so that it has `/admin/roles`.
        reads: Nothing is changed from the page: it stands alone, over a database that somebody else writes.
    """

    config: FusionConfig
    database: Database
    keys: KeyRing
    traces: TraceStore
    owner: Callable[[str | None], str | None]
    models: Callable[[], list[str]]
    roles: bool = False
    reads: bool = False
