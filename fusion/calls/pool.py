"""The pool: reaches the configured models, and asks several of them at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Call
from mixfuse.fusion.calls.board import Board
from mixfuse.fusion.calls.dialect import with_own
from mixfuse.fusion.calls.failures import CallError, FailureKind
from mixfuse.fusion.calls.ledger import Ledger, Spend, most
from mixfuse.fusion.calls.model_limits import Guard
from mixfuse.fusion.calls.upstream import (
    Client,
    Emit,
    Endpoint,
    Purpose,
    Reply,
    call,
    cancelled_as,
    forward,
    http_client,
)
from mixfuse.fusion.config import Member, ModelConfig
from mixfuse.fusion.messages import Message, with_system

Result = TypeVar("Result")


class RoleSource(Protocol):
    """Knows where roles are served; for example a running server's role table."""

    def lease(self, role: str) -> AbstractAsyncContextManager[Endpoint]:
        """Yields the role's endpoint; its adapter revision stays pinned until the block ends.

        Raises:
            MixfuseError: The role is unknown or not served; raised on entering the block.
        """
        ...

    def names(self) -> list[str]:
        """Returns the names of the roles."""
        ...


class HttpRoles:
    """The roles of a running gateway, reached over HTTP under their names."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self._base_url = base_url
        self._api_key = api_key

    @asynccontextmanager
    async def lease(self, role: str) -> AsyncIterator[Endpoint]:
        """Yields an endpoint whose model is the role; the gateway pins the revision."""
        yield Endpoint(self._base_url, role, self._api_key)

    def names(self) -> list[str]:
        """Returns none: only the gateway itself knows its roles."""
        return []


class Pool:
    """Reaches every configured model over one shared HTTP client; an async context manager.

    Args:
        roles: Knows where roles are served; None if the config names no role.
        board: Shares the circuit breakers with other processes.
    """

    def __init__(self, roles: RoleSource | None, board: Board | None = None) -> None:
        self._roles, self._board = roles, board
        self._client: Client | None = None
        self.guards: dict[str, Guard] = {}
        self.without_tools: set[tuple[str, str]] = (
            set()
        )  # (base URL, model) of readers that refused tool calls and results

    async def __aenter__(self) -> Self:
        self._client = http_client()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.client.close()

    @property
    def client(self) -> Client:
        """The HTTP client; exists while the pool is entered."""
        if self._client is None:
            raise RuntimeError("the pool has not been entered")
        return self._client

    def role_names(self) -> list[str]:
        """Returns the roles that can be asked for by name."""
        return self._roles.names() if self._roles else []

    async def revision(self, role: str) -> str | None:
        """Returns the adapter revision that serves a role now; None for the base.

        Raises:
            MixfuseError: The role is not served.
        """
        if self._roles is None:
            raise MixfuseError(f"role {role!r}: there is no server beside this gateway")
        async with self._roles.lease(role) as endpoint:
            return endpoint.revision

    @asynccontextmanager
    async def lease(self, model: ModelConfig, purpose: Purpose, ledger: Ledger) -> AsyncIterator[Endpoint]:
        """Yields the endpoint of a model, with its limits; a role's revision stays pinned until the block ends.

        Raises:
            CallError: The role is not served (`unreachable`); the ledger gets an entry too.
        """
        endpoint = self._fixed_endpoint(model, purpose)
        if endpoint is not None:
            yield endpoint
            return
        role = model.role or ""
        async with AsyncExitStack() as stack:
            try:
                if self._roles is None:
                    raise MixfuseError(f"role {role!r}: there is no server beside this gateway")
                endpoint = await stack.enter_async_context(self._roles.lease(role))
            except MixfuseError as error:
                ledger.enter(
                    Call(
                        stage=purpose.stage,
                        member=purpose.member,
                        model=role,
                        candidate=purpose.candidate,
                        outcome="unreachable",
                        error=str(error),
                        started_ms=ledger.elapsed_ms(),
                    )
                )
                raise CallError("unreachable", str(error)) from error
            guard = self.guard(model, purpose.member)
            yield replace(endpoint, guard=guard, dialect=guard.dialect, headers=model.headers)

    def _fixed_endpoint(self, model: ModelConfig, purpose: Purpose) -> Endpoint | None:
        """Returns the endpoint of a model that is not a role, which needs no lease; None for a role."""
        if model.base_url is None or model.model is None:
            return None
        guard = self.guard(model, purpose.member)
        return Endpoint(
            model.base_url, model.model, model.api_key, guard=guard, dialect=guard.dialect, headers=model.headers
        )

    def guard(self, model: ModelConfig, name: str) -> Guard:
        """Returns the limits that all calls to a model share; `name` is "judge" or "synthesizer" if it is no member."""
        name = model.name if isinstance(model, Member) else name
        guard = self.guards.get(name)
        if guard is None:
            guard = self.guards[name] = Guard(name, model, board=self._board)
        return guard

    async def ask(
        self,
        model: ModelConfig,
        messages: Sequence[Message],
        parameters: Mapping[str, Any],
        *,
        purpose: Purpose,
        ledger: Ledger,
        emit: Emit | None = None,
        think: Emit | None = None,
    ) -> Reply:
        """Asks one configured model, with its own system message and defaults; see `upstream.call`.

        Raises:
            CallError: No usable answer came back.
        """
        messages, parameters = with_system(model.system, messages), with_own(model, parameters)
        endpoint = self._fixed_endpoint(model, purpose)
        stack = nullcontext(endpoint) if endpoint is not None else self.lease(model, purpose, ledger)
        async with stack as endpoint:
            return await call(
                self.client, endpoint, messages, parameters, purpose=purpose, ledger=ledger, emit=emit, think=think
            )

    async def forward(
        self,
        model: ModelConfig,
        body: Mapping[str, Any],
        *,
        path: str,
        inputs: Sequence[Message],
        parameters: Mapping[str, Any],
        purpose: Purpose,
        ledger: Ledger,
    ) -> dict[str, Any]:
        """Passes a request to another route of one configured model; see `upstream.forward`.

        Raises:
            CallError: No usable response came back.
        """
        endpoint = self._fixed_endpoint(model, purpose)
        stack = nullcontext(endpoint) if endpoint is not None else self.lease(model, purpose, ledger)
        async with stack as endpoint:
            return await forward(
                self.client,
                endpoint,
                body,
                path=path,
                inputs=inputs,
                parameters=parameters,
                purpose=purpose,
                ledger=ledger,
            )


def estimate(model: ModelConfig, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Spend:
    """Estimates the most that asking a model costs; see `ledger.most`."""
    return most(with_system(model.system, messages), with_own(model, parameters), model.price, model.tokenizer)


async def fan_out(
    attempts: Sequence[Coroutine[Any, Any, Result]],
    *,
    quorum: int,
    grace_s: float | None = None,
    deadline_s: float | None = None,
    on_success: Callable[[list[Result | None]], None] | None = None,
) -> list[Result | CallError]:
    """Runs attempts at once until enough have succeeded.

    It returns when all have ended, when the quorum is met and the grace is over, at the deadline, or when the quorum
    can no longer be met. Attempts that still run then are cancelled, and have ended when this returns. The caller
    checks whether the quorum was met.

    Args:
        attempts: The attempts.
        quorum: The number of successes that is enough.
        grace_s: Seconds to wait for the others once the quorum is met; None: until the deadline.
        deadline_s: Seconds from now at which the wait ends; None: no limit.
        on_success: Gets the results so far (None where there is none yet) when the grace begins, and again with each
            further success while others still run.

    Returns:
        For each attempt, in order, its result or its failure; a cancelled one failed with `cancelled_straggler`, or
        with `timeout` if the deadline came.
    """
    clock = asyncio.get_running_loop().time
    end = None if deadline_s is None else clock() + deadline_s
    at_the_end: FailureKind = "timeout"
    tasks = [asyncio.ensure_future(attempt) for attempt in attempts]
    pending = set(tasks)
    successes, in_grace = 0, False
    try:
        while pending:
            wait_s = None if end is None else max(0.0, end - clock())
            # Wakes up only when the outcome could change.
            if successes + len(pending) == quorum:
                until = asyncio.FIRST_EXCEPTION
            elif successes >= quorum and (grace_s is None or (in_grace and on_success is None)):
                until = asyncio.ALL_COMPLETED
            else:
                until = asyncio.FIRST_COMPLETED
            done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=until)
            if not done:
                break
            successes += sum(task.exception() is None for task in done)
            if successes + len(pending) < quorum:
                at_the_end = "cancelled_straggler"
                break
            if successes >= quorum and grace_s is not None and not in_grace:
                in_grace = True
                if end is None or clock() + grace_s < end:
                    end, at_the_end = clock() + grace_s, "cancelled_straggler"
            if on_success is not None and in_grace and pending:
                on_success([_success(task) for task in tasks])
    except asyncio.CancelledError as stop:
        at_the_end = cancelled_as(stop)
        raise
    finally:
        await _cancel(pending, at_the_end)
    return [_outcome(task, at_the_end) for task in tasks]


def all_or_raise(results: Sequence[Result | CallError]) -> list[Result]:
    """Returns the results of a `fan_out` that must all have succeeded.

    Raises:
        CallError: An attempt failed. It is the first cause, not an attempt that was cancelled because of it.
    """
    errors = [result for result in results if isinstance(result, CallError)]
    if errors:
        raise next((error for error in errors if error.kind != "cancelled_straggler"), errors[0])
    return [result for result in results if not isinstance(result, CallError)]


async def _cancel(tasks: set["asyncio.Task[Result]"], outcome: FailureKind) -> None:
    for task in tasks:
        task.cancel(outcome)  # `upstream.call` notes it in the ledger
    if tasks:
        await asyncio.wait(tasks)


def _success(task: "asyncio.Task[Result]") -> Result | None:
    return None if not task.done() or task.cancelled() or task.exception() else task.result()


def _outcome(task: "asyncio.Task[Result]", if_cancelled: FailureKind) -> Result | CallError:
    if task.cancelled():
        reason = "the deadline came first" if if_cancelled == "timeout" else "cancelled: it was no longer needed"
        return CallError(if_cancelled, reason)
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, CallError):
        return error
    raise error
