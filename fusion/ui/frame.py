"""The frame of the page at `/ui`: the pages by name, who visits, templates, and the headers of every response."""

import asyncio
import hashlib
import logging
import math
import os
import pkgutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import orjson
from cryptography.fernet import Fernet
from markupsafe import Markup
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixfuse.contracts.database import Database
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.http.bodies import read_body
from mixfuse.fusion.http.inside import WATCH, Inside
from mixfuse.fusion.http.keys import ADMIN_KEY, UnauthorizedError, is_admin
from mixfuse.fusion.http.statuses import RequestError, status_of
from mixfuse.fusion.store.trace_facts import backfill
from mixfuse.fusion.ui import texts
from mixfuse.fusion.ui.sessions import Session, Sessions, secret_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ROOT = "/ui"
"""Where the page is."""

_ASSETS = Path(__file__).parent / "assets"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # No inline script or style, nothing from elsewhere: what a member wrote does nothing, even if escaping failed.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # `no-referrer` would take the Origin from our own forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_MOST_FIELDS = 10_000
_ANSWER_S = 10.0
_WRITTEN_S = 1.0
# The facts of so many older traces are written at a time, with a rest between: the gateway writes traces meanwhile.
_BACKFILL = 100
_REST_S = 0.05


class Visit:
    """A request for a page: who visits, and what the page may do for them.

    Attributes:
        request: The request.
        inside: What the gateway lends.
        session: The visitor's session.
    """

    def __init__(self, ui: "Ui", request: Request, session: Session) -> None:
        self._ui, self.request, self.session = ui, request, session
        self.inside: Inside = ui.inside

    @property
    def is_admin(self) -> bool:
        """Whether the visitor has the admin key, or none is set."""
        return is_admin(self.session.authorization)

    @property
    def by_admin_key(self) -> bool:
        """Whether the visitor logged in with the admin key."""
        return bool(os.environ.get(ADMIN_KEY)) and self.is_admin

    def known(self) -> None:
        """Checks that the visitor has a key, where one is needed.

        Raises:
            UnauthorizedError: A key is needed, and the visitor has none.
        """
        if self.inside.keys.needed and not self.by_admin_key:
            self.inside.keys.identify(self.session.authorization)

    def owner(self) -> str | None:
        """Returns the id of the API key whose traces the visitor may see; None for all, by the rule of `/v1/traces`.

        Raises:
            UnauthorizedError: A key is needed, and the visitor has none.
            RequestError: The config exposes nothing, and the visitor has not the admin key.
        """
        return self.inside.owner(self.session.authorization)

    def admin_only(self, what: str) -> None:
        """Refuses a visitor with an API key: what the page shows is not of one key.

        Args:
            what: What it is, for the message; in the plural.

        Raises:
            UnauthorizedError: A key is needed, and the visitor has none.
            RequestError: The visitor has an API key.
        """
        if not self._administers():
            raise RequestError(f"{what} need the admin key", code="forbidden", status=403)

    def sees_all(self) -> bool:
        """Whether pages that need the admin key would open."""
        try:
            return self._administers()
        except MixfuseError:
            return False

    def _administers(self) -> bool:
        return self.owner() is None and self.is_admin

    async def trace(self, trace_id: str) -> Trace:
        """Returns a trace that the visitor may see.

        Raises:
            RequestError: There is none of that id.
        """
        found = await self.inside.traces.get(trace_id, key_id=self.owner())
        if found is None:
            raise RequestError(f"there is no trace {trace_id[:100]!r}", code="trace_not_found", status=404)
        return found

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Runs a query that only reads: it finds the traces of all requests that have been answered.

        Where the database takes no traces now, those that it has are shown.

        Raises:
            MixfuseError: The database cannot be read, or not in time (`trace_db`).
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_WRITTEN_S):
                await self.inside.traces.written()
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self.inside.database.read(work)
        except (SQLAlchemyError, TimeoutError) as error:
            logger.warning("a page cannot be read from the database", exc_info=True)
            raise MixfuseError("the trace database cannot be read now; try again later", kind="trace_db") from error

    async def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """Returns a page.

        Args:
            template: The file of the template.
            status: The HTTP status.
            values: What the template shows.
        """
        return await self._ui.render(self, template, status, values)

    async def form(self) -> dict[str, str]:
        """Returns the fields of a form; of a field that comes more than once, the last."""
        return dict(await self.fields())

    async def fields(self) -> list[tuple[str, str]]:
        """Returns the fields of a form as (name, value), in their order.

        Raises:
            RequestError: The body is too long, or has too many fields.
        """
        body: bytes = self.request.state.body
        try:
            return parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise RequestError(f"a form has {_MOST_FIELDS} fields at most", code="too_many_fields") from None

    def json(self) -> Any:
        """Returns the JSON of a request that the script sent.

        Raises:
            RequestError: It is not JSON.
        """
        try:
            return orjson.loads(self.request.state.body)
        except ValueError:
            raise RequestError("the request body is not valid JSON", code="invalid_json") from None

    def seal(self, value: object) -> str:
        """Returns a value encrypted, for a form whose reader must not know it; `unseal` reads it."""
        return self._ui.sessions.seal(value)

    def unseal(self, sealed: str) -> Any:
        """Returns what `seal` was given; None if it is not ours or too old."""
        return self._ui.sessions.unseal(sealed)

    def to(self, path: str) -> Response:
        """Returns a redirect to a page, after a form has been sent.

        Args:
            path: Below `/ui`, such as `/traces`.
        """
        return RedirectResponse(ROOT + path, status_code=303)

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Calls the API in this process, with the visitor's key: all of its checks and limits hold.

        Args:
            method: Such as POST.
            path: Such as `/v1/traces/{id}/feedback`; with a query if there is one.
            body: Sent as JSON; None for no body.

        Returns:
            The JSON of the answer.

        Raises:
            RequestError: The API refuses it; with its message and status.
        """
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        await self.forward(method, path, body, keep)
        content = b"".join(message.get("body", b"") for message in sent)
        status = next(message["status"] for message in sent if message["type"] == "http.response.start")
        try:
            answer = orjson.loads(content) if content else None
        except ValueError:
            answer = content.decode(errors="replace")
        if status >= 400:
            error = answer.get("error", answer) if isinstance(answer, dict) else {"message": str(answer)}
            message = error.get("message", "") if isinstance(error, dict) else str(error)
            code = str(error.get("code") or "refused") if isinstance(error, dict) else "refused"
            raise RequestError(message, code=code, status=status)
        return answer

    async def forward(
        self, method: str, path: str, body: Any, send: Send, watch: Callable[[Call], None] | None = None
    ) -> None:
        """As `call`, but the answer goes to `send` as it comes, and `watch` is told of each call of a completion."""
        target = urlsplit(path)
        content = b"" if body is None else orjson.dumps(body)
        kept = ("host", "traceparent")
        headers = [(name, value) for name, value in self.request.headers.raw if name.decode("latin-1") in kept]
        headers += [(b"content-length", str(len(content)).encode())]
        headers += [(b"content-type", b"application/json")] if content else []
        if self.session.authorization is not None:
            headers.append((b"authorization", self.session.authorization.encode("latin-1", "replace")))
        scope = {key: value for key, value in self.request.scope.items() if key in _PASSED} | {
            "method": method,
            "path": target.path,
            "raw_path": quote(target.path).encode(),
            "query_string": target.query.encode(),
            "root_path": "",
            "headers": headers,
            WATCH: watch,
        }
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": content, "more_body": False}
            return await self.request.receive()  # that the visitor left

        await self.request.app(scope, receive, send)


_PASSED = ("type", "asgi", "http_version", "scheme", "client", "server", "extensions")
Handler = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True)
class Page:
    """A page: what a module in a folder of pages declares as `PAGE`.

    Attributes:
        title: Its name in the navigation.
        order: Its place there; the least comes first.
        gets: Path below the page → what shows it; "" is the page itself.
        posts: Path below the page → what does it; the CSRF token has been checked.
        shown: Whether a gateway has the page.
        alone: Whether `mixfuse ui` has it, too: what it shows is in the database or in files; its `posts` are left out.
        writes_files: What its `posts` change is a file of its own, so `mixfuse ui` has them, too.
        for_admin: Whether it needs the admin key, where one is set; others see no link to it.
    """

    title: str
    order: int
    gets: Mapping[str, Handler]
    posts: Mapping[str, Handler] = field(default_factory=dict)
    shown: Callable[[Inside], bool] = lambda _inside: True
    alone: bool = False
    writes_files: bool = False
    for_admin: bool = False


async def make(inside: Inside, packages: Sequence[str]) -> "Ui":
    """Builds the page."""
    sessions = Sessions(Fernet.generate_key() if inside.reads else await secret_of(inside.database))
    made = await asyncio.to_thread(Ui, inside, sessions, packages)
    if inside.reads:
        return made
    made.filling = asyncio.create_task(_backfill(inside.database))
    return made


async def _backfill(database: Database) -> None:
    """Writes the facts of traces that an earlier version wrote."""
    try:
        place, more = None, True
        while more:
            place = await database.run(partial(backfill, before=place, count=_BACKFILL))
            more = place is not None
            await asyncio.sleep(_REST_S)
    except Exception:  # whatever the driver raises; the next start tries again
        logger.warning("older traces may be missing from the lists of the page", exc_info=True)


class Ui:
    """The page as an ASGI application.

    Args:
        inside: What the gateway lends.
        sessions: Reads the visitors' cookies.
        packages: The packages in which each module is a page.
    """

    def __init__(self, inside: Inside, sessions: Sessions, packages: Sequence[str]) -> None:
        self.inside, self.sessions = inside, sessions
        self.filling: asyncio.Task[None] | None = None
        folders = [Path(str(import_module(package).__file__)).parent for package in packages]
        found = {
            module.name: import_module(f"{package}.{module.name}").PAGE
            for package, folder in zip(packages, folders, strict=True)
            for module in pkgutil.iter_modules([str(folder)])
        }
        shown = {name: page for name, page in found.items() if page.shown(inside) and (page.alone or not inside.reads)}
        self._pages: dict[str, Page] = dict(sorted(shown.items(), key=lambda item: item[1].order))
        self._environment = texts.environment(folders)
        self._assets = {path.name: path.read_bytes() for path in sorted(_ASSETS.iterdir())}
        self._version = hashlib.sha256(b"".join(self._assets.values())).hexdigest()[:12]
        routes = [
            Route("/", self._first),
            Route("/login", partial(self._answer, self._login), methods=["GET"]),
            Route("/login", partial(self._answer, self._log_in), methods=["POST"]),
            Route("/logout", partial(self._answer, self._log_out), methods=["POST"]),
            Route("/assets/{version}/{name}", self._asset),
        ]
        for name, page in self._pages.items():
            routes += [Route(f"/{name}{path}", partial(self._answer, show)) for path, show in page.gets.items()]
            routes += [
                Route(f"/{name}{path}", partial(self._answer, change), methods=["POST"])
                for path, change in page.posts.items()
                if page.writes_files or not inside.reads
            ]
        self._router: ASGIApp = Router(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; called by the server."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._router(scope, receive, guarded)
        except HTTPException as error:
            request = Request(scope, receive)
            wrapped = RequestError(
                f"there is nothing at {request.url.path}" if error.status_code == 404 else error.detail,
                code="not_found",
                status=error.status_code,
            )

            async def refuse(_visit: Visit) -> Response:
                raise wrapped

            await (await self._answer(refuse, request, checked=False))(scope, receive, guarded)

    async def render(self, visit: Visit, template: str, status: int, values: Mapping[str, Any]) -> Response:
        """Returns a page from its template; the visitor's session is kept by a cookie."""
        token = self.sessions.token(visit.session)
        path = visit.request.url.path.removeprefix(ROOT).strip("/")
        here = path.partition("/")[0]
        writes = here in self._pages and self._pages[here].writes_files
        frame = {
            "root": ROOT,
            "assets": f"{ROOT}/assets/{self._version}",
            "pages": {name: page for name, page in self._pages.items() if not page.for_admin or visit.sees_all()},
            "here": here,
            "token": token,
            "csrf": lambda: Markup('<input type="hidden" name="csrf" value="{}">').format(token),
            "named": bool(visit.session.key),
            "keyed": self.inside.keys.needed or bool(os.environ.get(ADMIN_KEY)),
            "is_admin": visit.by_admin_key,
            "query": _query(visit.request),
            "reads": self.inside.reads and not writes,
        }
        made = self._environment.get_template(template)
        # In a thread: a trace may have megabytes of text.
        content = await asyncio.to_thread(made.render, **frame, **values)
        response = Response(content, status, media_type="text/html")
        if self.sessions.read(visit.request.cookies.get(_cookie_name(visit.request))) is None:
            self._keep(visit.request, response, visit.session)
        return response

    async def _answer(self, handler: Handler, request: Request, *, checked: bool = True) -> Response:
        """Answers a request for a page; what is refused is a page, too."""
        known = self.sessions.read(request.cookies.get(_cookie_name(request)))
        visit = Visit(self, request, known or self.sessions.new())
        try:
            if request.method == "POST" and checked:
                await self._check(visit)
            return await handler(visit)
        except UnauthorizedError as error:
            if request.method == "GET" and not visit.session.key:
                there = request.url.path.removeprefix(ROOT) + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(f"{ROOT}/login?{urlencode({'next': there})}", status_code=303)
            return await self._refused(visit, error)
        except MixfuseError as error:
            return await self._refused(visit, error)

    async def _refused(self, visit: Visit, error: MixfuseError) -> Response:
        status = status_of(error)
        if visit.request.headers.get("accept", "").startswith("application/json"):
            return Response(orjson.dumps({"error": str(error)}), status, media_type="application/json")
        return await self.render(visit, "error.html.jinja", status, {"message": str(error), "status": status})

    async def _check(self, visit: Visit) -> None:
        """Reads a form and checks its token; the browser's `Origin` has been checked by `BrowserGuard`, if it came.

        Raises:
            RequestError: The token is missing or another session's, or the body is too long.
        """
        request = visit.request
        request.state.body = bytes(await read_body(request))
        sent = request.headers.get("x-csrf-token")
        if sent is None and request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            sent = (await visit.form()).get("csrf")
        if not self.sessions.matches(visit.session, sent or ""):
            raise RequestError(
                "this form is too old or came from another page; go back, load the page again and send it once more",
                code="csrf",
                status=403,
            )

    async def _first(self, request: Request) -> Response:
        return RedirectResponse(f"{ROOT}/{next(iter(self._pages))}", status_code=303)

    async def _login(self, visit: Visit) -> Response:
        return await visit.page("login.html.jinja", problem=None, next=visit.request.query_params.get("next", ""))

    async def _log_in(self, visit: Visit) -> Response:
        form = await visit.form()
        key, there = form.get("key", "").strip(), form.get("next", "")
        admin = bool(os.environ.get(ADMIN_KEY)) and is_admin(f"Bearer {key}")
        try:
            if not key or not key.isascii():
                raise UnauthorizedError("that is no key of this gateway")
            if not admin and self.inside.keys.identify(f"Bearer {key}") is None:
                raise UnauthorizedError("this gateway has no API keys; log in with the admin key, or not at all")
        except UnauthorizedError as error:
            problem = str(error) if "API key of this gateway" not in str(error) else "that is no key of this gateway"
            return await visit.page("login.html.jinja", status=401, problem=problem, next=there)
        response = RedirectResponse(ROOT + _local(there), status_code=303)
        self._keep(visit.request, response, self.sessions.new(key))
        return response

    async def _log_out(self, visit: Visit) -> Response:
        response = visit.to("/login")
        response.delete_cookie(_cookie_name(visit.request), path=ROOT, httponly=True, samesite="strict")
        return response

    def _keep(self, request: Request, response: Response, session: Session) -> None:
        secure = request.url.scheme == "https"
        cookie = self.sessions.cookie(session)
        response.set_cookie(_cookie_name(request), cookie, path=ROOT, httponly=True, samesite="strict", secure=secure)

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            raise HTTPException(404)
        # Its address has the version in it.
        kept = {"cache-control": "private, max-age=31536000, immutable"}
        return Response(self._assets[name], media_type=_TYPES[Path(name).suffix], headers=kept)


def number_of(value: str, name: str, kind: type[int] | type[float] = float) -> float:
    """Returns a field of a form or a query as a number.

    Raises:
        RequestError: It is none, or not finite.
    """
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name!r} must be {what}, not {value[:100]!r}", code="invalid_value", param=name)
    return number


def _cookie_name(request: Request) -> str:
    """The cookie's name: browsers send cookies to every port of a host, and each gateway there has its own."""
    return f"mixfuse-{request.url.port or 'ui'}"


def _local(path: str) -> str:
    """Returns a path below the page, or its beginning if this is none: a login leads nowhere else."""
    fine = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if fine else "/"


def _query(request: Request) -> Callable[..., str]:
    """Returns what a template writes links with: the query of this page, with changes; None takes a field out."""
    given = dict(request.query_params)

    def query(**changes: Any) -> str:
        merged = {name: value for name, value in (given | changes).items() if value not in (None, "")}
        return "?" + urlencode(merged) if merged else "?"

    return query
