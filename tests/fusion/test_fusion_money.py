"""What may be spent and asked for: reservations cover all that is sent, limits are numbers, fan-out has caps."""

import asyncio
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import mistral_common
import openai
import pytest
import sentencepiece
from fake_upstream import FakeUpstream, Script, serving
from fusion_harness import Gateway, StartGateway
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.calls.ledger import IMAGE_TOKENS, most, prompt_tokens
from mixfuse.fusion.config import FusionConfig, Price
from mixfuse.fusion.http.gateway import create_app
from mixfuse.fusion.http.keys import create

HELLO = [{"role": "user", "content": "why?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "x" * 4000}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FREE = Price()


def member(upstream: FakeUpstream, **keys: Any) -> dict[str, Any]:
    return {"name": "alpha", "base_url": upstream.base_url, "model": "alpha", **keys}


# What is reserved


def texts() -> dict[str, str]:
    """Texts of many kinds, the worst for a tokenizer among them."""
    draw = random.Random(0)
    kinds = {
        "letters": string.ascii_letters,
        "consonants": "qzxjkvwQZXJ",
        "digits": string.digits,
        "printable": string.printable,
        "cjk": "".join(map(chr, range(0x4E00, 0x9FFF))),
        "hangul": "".join(map(chr, range(0xAC00, 0xD7A3))),
        "emoji": "".join(map(chr, range(0x1F300, 0x1F6FF))),
        "rare": "".join(map(chr, range(0x10400, 0x1FFFF))),
        "arabic": "".join(map(chr, range(0x0620, 0x064A))),
    }
    made = {kind: "".join(draw.choices(alphabet, k=600)) for kind, alphabet in kinds.items()}
    return made | {"page": Path(__file__).read_text(), "zq": "zq" * 300, "newlines": "\n" * 600}


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    data = Path(mistral_common.__file__).parent / "data"
    sentences = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model.v1"))
    tekken = Tekkenizer.from_file(str(data / "tekken_240911.json"))
    return [sentences.encode, lambda text: tekken.encode(text, bos=False, eos=False)]


@pytest.mark.parametrize("kind", sorted(texts()))
def test_no_tokenizer_finds_more_tokens_than_are_reserved(kind: str, tokenizers: list[Any]) -> None:
    text = texts()[kind]
    reserved = most([{"role": "user", "content": text}], {"max_tokens": 1}, FREE).tokens - 1
    assert all(len(encode(text)) <= reserved for encode in tokenizers)


def test_all_that_is_sent_is_counted() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "' + "y" * 999}}
    long, plain = "z" * 999, most(HELLO, {"max_tokens": 1}, FREE).tokens
    for messages, parameters, least in (
        (HELLO, {"tools": [WEATHER]}, 4000),
        (HELLO, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, 4000),
        ([{"role": "assistant", "content": None, "tool_calls": [call]}], {}, 1000),
        ([{"role": "user", "content": "why?", "name": long}], {}, 999),
        ([{"role": "tool", "content": "ok", "tool_call_id": long}], {}, 999),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}], {}, 1000),
    ):
        assert most(messages, {"max_tokens": 1, **parameters}, FREE).tokens - plain >= least - 20
        assert prompt_tokens(messages, parameters) >= min(least // 4, IMAGE_TOKENS)


async def test_tools_and_cjk_count_against_a_budget_before_anything_is_sent(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    priced = member(upstream, price={"prompt": 1.0, "completion": 0.0})
    gateway = await start_gateway([priced], modes={"max_cost": 0.001})  # a thousand tokens
    create_ = gateway.client.chat.completions.create
    for body in (
        {"messages": HELLO, "tools": [WEATHER]},
        {"messages": [{"role": "user", "content": "\u4f60" * 999}]},
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    ):
        for model in ("alpha", "fusion/best-of"):
            with pytest.raises(openai.APIStatusError) as caught:
                await create_(model=model, **body)  # type: ignore[call-overload]
            assert caught.value.status_code == 402
    assert upstream.requests == []
    assert (await create_(model="alpha", messages=HELLO)).choices[0].message.content == "the answer of alpha"


async def test_what_was_sent_is_charged_where_no_usage_comes_back(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["alpha"].usage = None
    answer = await gateway.client.chat.completions.create(model="alpha", messages=HELLO, tools=[WEATHER])
    assert answer.usage.prompt_tokens >= len(json.dumps(WEATHER)) / 4


async def test_a_tokenizer_of_the_model_counts_exactly(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    text = "word " * 500  # 500 tokens, 2500 bytes
    question = [{"role": "user", "content": text}]
    exact = member(upstream, price={"prompt": 1.0}, tokenizer=str(tmp_path / "tokenizer.json"))
    for models_, status in (([exact], 200), ([{**exact, "tokenizer": None}], 402)):
        gateway = await start_gateway(models_, modes={"max_cost": 0.001})
        assert (await gateway.post(model="alpha", messages=question)).status_code == status
    with pytest.raises(MixfuseError, match="tokenizer"):
        await start_gateway([{**exact, "tokenizer": str(tmp_path / "none.json")}])


async def test_requests_at_once_never_spend_more_than_the_budget(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """The endpoint bills every byte of the prompt and every token of the answer that was allowed."""
    with opened(str(tmp_path / "traces.sqlite3")) as database:
        _, secret = create(database, "ann", max_tokens=2000)
    gateway = await start_gateway(["alpha"])
    gateway.http.headers["authorization"] = f"Bearer {secret}"
    text = "\u4f60\u597d" * 20
    upstream.models["alpha"].usage = (len(text.encode()), 50)
    bodies = [gateway.post(model="alpha", messages=[{"role": "user", "content": text}], max_tokens=50)] * 1
    bodies += [
        gateway.post(model="alpha", messages=[{"role": "user", "content": text}], max_tokens=50) for _ in range(39)
    ]
    statuses = [response.status_code for response in await asyncio.gather(*bodies)]
    assert set(statuses) == {200, 402}
    traces = (await gateway.http.get("/v1/traces", params={"limit": 100})).json()["data"]
    spent = sum(sum(call["usage"].values()) for trace in traces for call in trace["calls"])
    assert 1500 < spent <= 2000


# Numbers that limit


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1", "0", "1e400", "a lot"])
@pytest.mark.parametrize("option", ["--budget", "--tokens", "--rate"])
def test_a_key_without_a_real_limit_is_refused(
    option: str, number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["keys", "add", "ann", f"{option}={number}", "--db", str(tmp_path / "t.sqlite3")])
    assert left.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "t.sqlite3").exists()


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "0"])
@pytest.mark.parametrize("option", ["--canary", "--for", "--timeout"])
def test_a_gate_without_a_real_limit_is_refused(
    option: str, number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {"--canary": "10%", "--for": "90s", "--timeout": "10m", option: number}
    arguments = [f"{name}={value}" for name, value in gate.items()]
    assert main(["roles", "swap", "judge", str(tmp_path), *arguments, "--url", "http://127.0.0.1:9"]) == 2
    assert repr(number) in capsys.readouterr().err


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1, 0, 10**30])
@pytest.mark.parametrize("kind", ["max_cost", "max_tokens", "per_minute"])
def test_no_program_makes_an_unlimited_key_by_mistake(kind: str, limit: float, tmp_path: Path) -> None:
    with opened(str(tmp_path / "t.sqlite3")) as database, pytest.raises(MixfuseError, match="more than 0"):
        create(database, "ann", **{kind: limit})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys",
    [
        {"modes": {"max_cost": float("inf")}},
        {"modes": {"max_cost": float("nan")}},
        {"modes": {"deadline_ms": float("inf")}},
        {"modes": {"grace_ms": float("nan")}},
        {"members": [{"name": "a", "base_url": "http://x/v1", "model": "m", "price": {"prompt": float("nan")}}]},
        {"members": [{"name": "a", "base_url": "http://x/v1", "model": "m", "price": {"prompt": float("inf")}}]},
        {"members": [{"name": "a", "base_url": "http://x/v1", "model": "m", "timeout_s": float("inf")}]},
        {"presets": {"p": {"max_cost": float("nan")}}},
        {"traces": {"retention_days": float("inf")}},
    ],
)
def test_a_config_takes_only_numbers(keys: dict[str, Any]) -> None:
    members = [{"name": "a", "base_url": "http://x/v1", "model": "m"}]
    with pytest.raises(ValueError, match=r"number|greater than|less than"):
        FusionConfig.model_validate({"members": members, **keys})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 2**40}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"temperature": -1}, "temperature"),
        ({"fusion": {"samples": 65}}, "fusion.samples"),
        ({"fusion": {"deadline_ms": 1e300}}, "fusion.deadline_ms"),
        ({"fusion": {"min_responses": 10**9}}, "fusion.min_responses"),
        ({"fusion": {"max_cost": -1}}, "fusion.max_cost"),
        ({"fusion": {"grace_ms": -1}}, "fusion.grace_ms"),
        ({"fusion": {"target": 1.5}}, "fusion.target"),
        ({"fusion": {"width": 0}}, "fusion.width"),
    ],
)
async def test_a_number_out_of_range_is_refused_by_name(
    gateway: Gateway, upstream: FakeUpstream, body: dict[str, Any], param: str
) -> None:
    response = await gateway.post(model="fusion/best-of", messages=HELLO, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert upstream.requests == []


# Fan-out


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"samples": 3}, "fusion.samples"),
        ({"mode": "debate", "max_rounds": 2}, "fusion.max_rounds"),
        ({"deadline_ms": 5001}, "fusion.deadline_ms"),
    ],
)
async def test_the_operator_caps_what_a_request_may_ask_for(
    start_gateway: StartGateway, upstream: FakeUpstream, options: dict[str, Any], param: str
) -> None:
    gateway = await start_gateway(caps={"samples": 2, "rounds": 1, "deadline_ms": 5000})
    with pytest.raises(openai.BadRequestError, match="at most") as caught:
        await gateway.client.chat.completions.create(
            model="fusion/best-of", messages=HELLO, extra_body={"fusion": options}
        )
    assert caught.value.param == param
    assert upstream.requests == []
    allowed = {"samples": 2, "max_rounds": 1, "deadline_ms": 5000}
    assert (await gateway.post(model="fusion/best-of", messages=HELLO, fusion=allowed)).status_code == 200


async def test_the_calls_of_a_request_are_capped(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = await start_gateway(caps={"calls": 9})  # three answers and three pairs in both orders
    assert (await gateway.post(model="fusion/best-of", messages=HELLO)).status_code == 200
    assert len(upstream.requests) == 9
    for more in ({"samples": 2}, {"mode": "debate"}):
        response = await gateway.post(model="fusion/best-of", messages=HELLO, fusion=more)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "fusion")
        assert "caps.calls" in response.json()["error"]["message"]
    assert len(upstream.requests) == 9


async def test_expose_none_is_final(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        modes={"expose": "none"}, presets={"quiet": {"expose": "none"}, "loud": {"expose": "full"}}
    )
    for model in ("fusion/best-of", "quiet", "loud", "alpha"):
        body = (await gateway.post(model=model, messages=HELLO, fusion={"expose": "full"})).json()
        assert "fusion" not in body, model
    open_ = await start_gateway(presets={"quiet": {"expose": "none"}})
    assert "fusion" not in (await open_.post(model="quiet", messages=HELLO, fusion={"expose": "full"})).json()
    assert "fusion" in (await open_.post(model="fusion/best-of", messages=HELLO, fusion={"expose": "full"})).json()


async def test_where_nothing_is_exposed_a_failure_names_no_member(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = await start_gateway(modes={"expose": "none"})
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name] = Script(status=500, body=b'{"error": {"message": "secret of the endpoint"}}')
    for path in ("/v1/chat/completions", "/v1/messages"):
        body = {"model": "fusion/best-of", "messages": HELLO, "max_tokens": 50}
        response = await gateway.http.post(path, json=body)
        assert response.status_code == 503
        assert "0 of at least 1 members answered" in response.text
        assert not any(word in response.text for word in ("alpha", "beta", "gamma", "secret"))
    (trace, *_) = (await gateway.http.get("/v1/traces")).json()["data"]
    assert "alpha: upstream_error" in trace["error"]  # the operator still sees it
    for status in (429, 400):
        for name in ("alpha", "beta", "gamma"):
            upstream.models[name] = Script(status=status)
        assert (await gateway.post(model="fusion/best-of", messages=HELLO)).status_code == status


async def test_where_nothing_is_exposed_a_key_reads_no_traces(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(str(tmp_path / "traces.sqlite3")) as database:
        _, secret = create(database, "ann")
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "admin")
    gateway = await start_gateway(modes={"expose": "none"})
    gateway.http.headers["authorization"] = f"Bearer {secret}"
    made = (await gateway.post(model="fusion/best-of", messages=HELLO)).json()
    path = f"/v1/traces/{made['id'].replace('chatcmpl-', 'trace-')}"
    for where in ("/v1/traces", path):
        response = await gateway.http.get(where)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "not_exposed")
    added = await gateway.http.post(f"{path}/feedback", json={"score": 1})
    assert added.status_code == 200
    assert "the answer" not in added.text
    admin = {"authorization": "Bearer admin"}
    assert (await gateway.http.get(path, headers=admin)).json()["answer"] == "the answer of beta"


# Web pages


HOSTILE_HOSTS = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1"]


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
async def test_a_rebound_name_reads_and_spends_nothing(gateway: Gateway, upstream: FakeUpstream, host: str) -> None:
    for method, path in (
        ("GET", "/v1/traces"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/traces/trace-1"),
    ):
        response = await gateway.http.request(
            method, path, headers={"host": host}, json={} if method == "POST" else None
        )
        assert response.status_code in (400, 403), path
        if response.headers["content-type"].startswith("application/json"):
            assert response.json()["error"]["code"] == "host_not_allowed"
    assert upstream.requests == []


async def test_admin_paths_are_no_way_in(config: Callable[..., FusionConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    async def swap(_request: Request) -> Response:
        return Response("swapped")

    app = create_app(config(), None, extra_routes=[Route("/admin/roles/judge", swap, methods=["PUT", "POST"])])
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as http:

        async def status(**headers: str) -> int:
            body = b'{"directory": "x"}'
            return (await http.put("/admin/roles/judge", content=body, headers=headers)).status_code

        assert await status(host="evil.example") == 403
        assert await status(origin="https://evil.example") == 403
        assert await status(**{"content-type": "text/plain"}) == 415
        assert await status(**{"content-type": "application/json"}) == 200
        monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "admin")  # the handlers ask for it, so the name is no matter
        assert await status(host="ops.example", **{"content-type": "application/json"}) == 200


async def test_loopback_addresses_and_allowed_hosts_are_served(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(allowed_hosts=["Gate.example"])
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "10.1.2.3:8080", "gate.example", "GATE.example.:443"):
        assert (await gateway.http.get("/v1/models", headers={"host": host})).status_code == 200, host
    assert (await gateway.http.get("/v1/models", headers={"host": "other.example"})).status_code == 403
    assert (await gateway.http.get("/healthz", headers={"host": "other.example"})).status_code == 200


async def test_a_foreign_page_cannot_spend(gateway: Gateway, upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "alpha", "messages": HELLO})
    for headers, status in (
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/json", "origin": "https://evil.example"}, 403),
        ({"content-type": "application/json", "origin": "null"}, 403),
        ({"content-type": "text/plain", "origin": "https://evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
    ):
        response = await gateway.http.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == status, headers
        assert response.json()["error"]["message"]
    assert upstream.requests == []
    own = {"content-type": "application/json; charset=utf-8", "origin": gateway.url}
    assert (await gateway.http.post("/v1/chat/completions", content=body, headers=own)).status_code == 200


async def test_pages_that_the_config_names_may_call(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(cors_origins=["https://app.example"])
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        answer = await gateway.http.options("/v1/chat/completions", headers={"origin": origin, **ask})
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    response = await gateway.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    plain = await start_gateway()
    assert "access-control-allow-origin" not in (await plain.http.get("/v1/models")).headers


async def test_with_a_key_the_name_does_not_matter(start_gateway: StartGateway, tmp_path: Path) -> None:
    with opened(str(tmp_path / "traces.sqlite3")) as database:
        _, secret = create(database, "ann")
    gateway = await start_gateway()
    headers = {"host": "gate.example", "authorization": f"Bearer {secret}"}
    assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 200
    assert (await gateway.http.get("/v1/models", headers={"host": "gate.example"})).status_code == 401
    assert (await gateway.http.get("/metrics", headers=headers)).status_code == 403
