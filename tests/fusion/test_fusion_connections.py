"""The limits of connections, each with raw sockets against a running gateway that serves on beside them."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

HELLO: list[Any] = [{"role": "user", "content": "why?"}]
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(body: bytes, *headers: str, length: int | None = None, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body) if length is None else length}\r\n\r\n"]).encode() + body


@asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = httpx.URL(gateway.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    finally:
        await abort(writer)


async def abort(*writers: asyncio.StreamWriter) -> None:
    """Resets connections; one may have been reset by the gateway before."""
    for writer in writers:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def said(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """The status and the error that the gateway sends before it closes the connection; 0 if it sends nothing."""
    async with asyncio.timeout(30):
        try:
            data = await reader.read(-1)
        except ConnectionError:
            data = b""
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["error"]) if head else (0, {})


async def serves(gateway: Gateway) -> None:
    response = await gateway.post(model="fusion/best-of", messages=HELLO)
    assert response.status_code == 200, response.text
    ready = await gateway.http.get("/readyz")
    assert ready.status_code == 200, ready.text


async def cut(gateway: Gateway, limit: str) -> float:
    return (await gateway.metrics()).get(f'mixfuse_connections_cut_total{{limit="{limit}"}}', 0)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n", HEALTH + b"GET / HTTP/1.1\r\nx: y\r\n"])
async def test_slow_headers_end(start_gateway: StartGateway, sent: bytes) -> None:
    gateway = await start_gateway(limits={"header_timeout_s": 0.3})
    async with connected(gateway) as (reader, writer):
        writer.write(sent)
        if sent.startswith(HEALTH):
            await reader.readuntil(b'"ok"}')
        status, error = await said(reader)
        assert (status, error["code"]) == (408, "header_timeout_s")
    assert await cut(gateway, "header_timeout_s") == 1
    await serves(gateway)


async def test_a_connection_that_trickles_its_headers_ends(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(limits={"header_timeout_s": 0.5})
    async with connected(gateway) as (reader, writer):
        reading = asyncio.create_task(said(reader))
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        while not reading.done():
            writer.write(b"x: y\r\n")
            await asyncio.sleep(0.05)
        assert (await reading)[0] == 408


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 20_000,
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * 20_000,
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 3000 + b"\r\n",
    ],
)
async def test_long_headers_are_refused(start_gateway: StartGateway, sent: bytes) -> None:
    gateway = await start_gateway(limits={"header_bytes": 8192})
    async with connected(gateway) as (reader, writer):
        writer.write(HEALTH)  # the first request of a connection, and a later one
        await reader.readuntil(b'"ok"}')
        writer.write(sent)
        status, error = await said(reader)
        assert (status, error["code"]) == (431, "header_bytes")
    async with connected(gateway) as (reader, writer):
        writer.write(sent)
        assert (await said(reader))[0] == 431
    assert await cut(gateway, "header_bytes") == 2
    await serves(gateway)


async def test_a_long_body_is_refused_before_and_while_it_is_read(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(limits={"body_bytes": 100_000})
    body = json.dumps({"model": "alpha", "messages": [{"role": "user", "content": "x" * 200_000}]}).encode()

    async def chunked() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for path in ("/v1/chat/completions", "/v1/traces/trace-1/feedback", "/v1/responses"):
        for content in (body, chunked()):
            response = await gateway.http.post(path, content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_bytes")
    async with connected(gateway) as (reader, writer):  # refused before it is sent
        writer.write(post(b"", length=10**15))
        status, error = await said(reader)
        assert (status, error["code"]) == (413, "body_bytes")
    await serves(gateway)


async def test_a_slow_body_ends(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(limits={"body_timeout_s": 0.3})
    async with connected(gateway) as (reader, writer):
        writer.write(post(b'{"model": ', length=1000))
        status, error = await said(reader)
        assert (status, error["code"]) == (408, "body_timeout_s")
    async with connected(gateway) as (_, writer):  # and one whose client goes away amid its body is no bug
        writer.write(post(b'{"model": ', length=1000))
        await writer.drain()
    await serves(gateway)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "gzip, gzip", "x"])
async def test_encoded_bodies_are_refused(start_gateway: StartGateway, encoding: str) -> None:
    gateway = await start_gateway()
    bomb = gzip.compress(b" " * 50_000_000)
    for path in ("/v1/chat/completions", "/v1/traces/trace-1/feedback"):
        response = await gateway.http.post(path, content=bomb, headers={"content-encoding": encoding})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")
    await serves(gateway)


async def test_an_idle_connection_is_closed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(limits={"idle_timeout_s": 0.2})
    async with connected(gateway) as (reader, writer):
        writer.write(HEALTH)
        async with asyncio.timeout(30):
            assert (await reader.read(-1)).startswith(b"HTTP/1.1 200")


async def test_a_pipelined_flood_ends(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    async with connected(gateway) as (reader, writer):
        writer.write(HEALTH * 10)  # as many as a client may
        for _ in range(10):
            await reader.readuntil(b'"ok"}')
        writer.write(HEALTH * 20_000)
        async with asyncio.timeout(30):
            try:
                while await reader.read(1 << 20):
                    pass
            except ConnectionError:
                pass
    assert await cut(gateway, "pipelined") == 1
    await serves(gateway)


async def test_a_client_that_leaves_a_pipeline_is_noticed(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway()
    upstream.models["alpha"].hold = asyncio.Event()
    async with connected(gateway) as (_, writer):
        writer.write(post(json.dumps({"model": "alpha", "messages": HELLO}).encode()) + HEALTH * 3)
        await upstream.wait_asked("alpha")
    await upstream.wait_aborted("alpha")


async def test_new_connections_take_the_place_of_those_that_only_wait(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(limits={"connections": 20})
    url = httpx.URL(gateway.url)
    opened = [await asyncio.open_connection(url.host, url.port) for _ in range(60)]
    for number, (_, writer) in enumerate(opened):  # nothing, half of the headers, half of a body
        writer.write((b"", b"GET / HTTP/1.1\r\nx:", post(b"{", length=100))[number % 3])
    for _ in range(5):
        async with httpx.AsyncClient(base_url=gateway.url) as fresh:
            assert (await fresh.get("/healthz")).status_code == 200
    await serves(gateway)
    assert await cut(gateway, "connections") >= 40
    assert (await gateway.metrics())["mixfuse_connections"] <= 20
    await abort(*(writer for _, writer in opened))


async def test_beyond_the_most_connections_at_work_new_ones_are_refused(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = await start_gateway(limits={"connections": 3})
    hold = upstream.models["alpha"].hold = asyncio.Event()
    asking = [asyncio.create_task(gateway.post(model="alpha", messages=HELLO)) for _ in range(3)]
    await upstream.wait_asked("alpha", 3)
    async with connected(gateway) as (reader, _):
        status, error = await said(reader)
        assert (status, error["code"]) == (503, "connections")
    hold.set()
    assert {(await one).status_code for one in asking} == {200}
    await serves(gateway)


async def test_readers_that_never_read_open_no_circuit(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    member = {
        "name": "alpha",
        "base_url": upstream.base_url,
        "model": "alpha",
        "timeout_s": 4.0,
        "breaker": {"failures": 3, "cooldown_ms": 60_000},
    }
    upstream.models["alpha"] = Script(body=stream_of("word " * 400_000))
    gateway = await start_gateway([member, "beta"], limits={"write_timeout_s": 6.0})  # longer than the member's
    url = httpx.URL(gateway.url)
    body = json.dumps({"model": "alpha", "messages": HELLO, "stream": True}).encode()
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (url.host, url.port))
            await loop.sock_sendall(client, post(body))
        await gateway.until_metric('mixfuse_connections_cut_total{limit="write_timeout_s"}', 20)
    metrics = await gateway.metrics()
    assert metrics['mixfuse_circuit_state{member="alpha"}'] == 0
    assert metrics['mixfuse_calls_under_way{member="alpha"}'] == 0
    traces = (await gateway.http.get("/v1/traces", params={"limit": 100})).json()["data"]
    assert [call["outcome"] for trace in traces for call in trace["calls"]] == ["cancelled"] * 20
    upstream.models["alpha"] = Script("hello")
    assert (await gateway.post(model="alpha", messages=HELLO)).status_code == 200


def stream_of(text: str) -> bytes:
    pieces = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\n\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_json(start_gateway: StartGateway, sent: bytes) -> None:
    gateway = await start_gateway(limits={"header_timeout_s": 1, "idle_timeout_s": 1, "body_timeout_s": 1})
    async with connected(gateway) as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(30):
            try:
                data = await reader.read(-1)
            except ConnectionError:
                data = b""
    if data:
        assert int(data.split()[1]) < 500
        assert b"application/json" in data
    await serves(gateway)
