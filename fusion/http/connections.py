"""The connections of a gateway: how many there are, and how long each may take to send, to wait and to read.

uvicorn reads a request from any number of bytes of headers, for any length of time, and waits for ever for a client to
take its answer. `Connections.protocol` adds the limits of the config to its protocol. `fusion/http/bodies.py` reads
bodies, within theirs.

Where there are more connections than `limits.connections`, the one that has waited longest for the rest of a request is
closed: a client that means to ask something has sent it by then.
"""

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mixfuse.fusion.config import Limits
from mixfuse.fusion.http.statuses import RequestError, error_body

# After an answer to a request that was not read whole: closed at once, the connection would lose the answer.
_LINGER_S = 2.0
_SEND_BUFFER = 256 << 10
"""Bytes that the system keeps of an answer for a client that does not read; Linux would let it grow to megabytes."""
_PER_HEADER = 32
"""Bytes that a header counts beside its own: what it takes in memory."""


class Connections(Collector):
    """The connections of one gateway.

    Args:
        limits: Their limits.

    Attributes:
        protocol: For `uvicorn.Config(http=…)`.
        cut: How many were cut or refused, by the reason.
        waiting: Those that have not sent a whole request, the oldest first.
        open: Their number.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # A request needs connections to the models, too.
        self.most = min(limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2)
        self.cut: Counter[str] = Counter()
        self.waiting: dict[_Connection, None] = {}
        self.open = 0
        self.protocol: type[asyncio.Protocol] = type("Connection", (_Connection,), {"shared": self})

    def collect(self) -> Iterable[Metric]:
        """Reads the metrics."""
        yield GaugeMetricFamily("mixfuse_connections", "Connections of clients", value=self.open)
        cut = CounterMetricFamily(
            "mixfuse_connections_cut", "Connections that were cut at one of their limits", labels=["limit"]
        )
        for limit, count in sorted(self.cut.items()):
            cut.add_metric([limit], count)
        yield cut


class _Connection(HttpToolsProtocol):
    """One connection, with limits."""

    shared: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared = self.shared
        if (connected := transport.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.timeout_keep_alive = shared.limits.idle_timeout_s  # type: ignore[assignment]
        self._received = self._head_bytes = 0
        self._in_body = self._refused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._running: RequestResponseCycle | None = None
        shared.open += 1
        if shared.open > shared.most:
            oldest = next(iter(shared.waiting), None)
            if oldest is None:
                self._refuse("connections", f"this gateway has {shared.most} connections under way", 503)
                return
            oldest._cut("connections")  # a class of this file
        shared.waiting[self] = None
        self._after(shared.limits.header_timeout_s, "header_timeout_s", self._slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self.shared.open -= 1
        self.shared.waiting.pop(self, None)
        # uvicorn tells the last request of a pipeline only.
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if not self._in_body:
            self._received += len(data)
            self._begin_head()
        super().data_received(data)
        if not self._in_body and not self._refused and self._received > self.shared.limits.header_bytes:
            self._long_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._begin_head()  # in a pipeline, it may begin amid what has been received

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._refused:
            return
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + _PER_HEADER
        if self._head_bytes > self.shared.limits.header_bytes:
            self._long_head()

    def on_headers_complete(self) -> None:
        self._stop("header_timeout_s")
        if self._head_bytes > self.shared.limits.header_bytes and not self._refused:  # a long URL, and no headers
            self._long_head()
        if self._refused:
            return
        if len(self.pipeline) >= self.shared.limits.pipelined:
            self._refused = True
            self._cut("pipelined")
            return
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._received = False, 0
        self.shared.waiting.pop(self, None)
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._after(self.shared.limits.write_timeout_s, "write_timeout_s", self._slow_reader)
        elif self._in_body and not self.pipeline:
            self._after(_LINGER_S, "linger", self._end)
        elif self.timeout_keep_alive_task is not None:
            self.shared.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after(self.shared.limits.write_timeout_s, "write_timeout_s", self._slow_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop("write_timeout_s")

    def timeout_keep_alive_handler(self) -> None:
        self._end()

    def send_400_response(self, msg: str) -> None:
        self._answer(RequestError(msg, code="invalid_http"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _after(self, seconds: float, name: str, act: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, act)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def _begin_head(self) -> None:
        if "header_timeout_s" not in self._timers:
            self._after(self.shared.limits.header_timeout_s, "header_timeout_s", self._slow_head)

    def _slow_head(self) -> None:
        seconds = self.shared.limits.header_timeout_s
        if self._running is not None and not self._running.response_complete:
            # Nothing is read while an answer is under way.
            self._after(seconds, "header_timeout_s", self._slow_head)
            return
        self._refuse("header_timeout_s", f"the headers of a request took more than {seconds:g} s", 408)

    def _long_head(self) -> None:
        size = self.shared.limits.header_bytes
        self._refuse("header_bytes", f"the headers of a request take more than {size} bytes", 431)

    def _slow_reader(self) -> None:
        self._cut("write_timeout_s")

    def _refuse(self, limit: str, message: str, status: int) -> None:
        """Answers with an error where no other answer is under way, and closes the connection."""
        self._refused = True
        self.shared.cut[limit] += 1
        if self._running is None or self._running.response_complete:
            self._answer(RequestError(message, code=limit, status=status))
        else:
            self.transport.abort()

    def _answer(self, error: RequestError) -> None:
        body = orjson.dumps(error_body(error))
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[error.status], len(body), body)
        )
        self._end()

    def _cut(self, limit: str) -> None:
        """Closes the connection at once, whatever is still to be sent."""
        self.shared.cut[limit] += 1
        self.shared.waiting.pop(self, None)
        self.transport.abort()

    def _end(self) -> None:
        """Closes the connection once the client has read all that was sent, which it has some time for."""
        self._refused = True
        self.shared.waiting.pop(self, None)
        if not self.transport.is_closing():
            self.transport.close()
        self._after(self.shared.limits.write_timeout_s, "write_timeout_s", self._slow_reader)
