"""docs/failures.md, cell by cell: what a client gets of each failure in each mode."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway

from mixfuse.contracts.database import opened
from mixfuse.fusion.calls.failures import KINDS
from mixfuse.fusion.http.keys import create

PAGE = (Path(__file__).parents[2] / "docs" / "failures.md").read_text(encoding="utf-8")
HELLO: list[Any] = [{"role": "user", "content": "why?"}]
NEVER = "\N{EN DASH}"
MEMBERS = ("alpha", "beta", "gamma")
MODELS = {
    "best_of": "fusion/best-of",
    "merge": "fusion/merge",
    "debate": "fusion/debate",
    "a model by its name": "alpha",
}
FAULTS = {
    "rate_limited": Script(status=429),
    "upstream_error": Script(status=500),
    "bad_request": Script(status=400, body=b'{"error": {"message": "seed: not an integer"}}'),
    "invalid_response": Script(body=b"{}"),
    "refused": Script(refusal="I would rather not"),
    "context_length": Script(status=400, body=b'{"error": {"code": "context_length_exceeded"}}'),
}
WHO = {"one member": ("alpha",), "two of three members": ("alpha", "gamma"), "all members": MEMBERS}
OF_REQUESTS = ("judge_failed", "too_few_answers", "trace_db", "trace_unreadable", "unauthorized")  # not of single calls
DOLLAR = {"prompt": 1e6, "completion": 1e6}  # a token


def rows(heading: str) -> list[dict[str, str]]:
    """The rows of the table under a heading, by column."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


CASES = [
    pytest.param(row["failure"].strip("`"), row["of"], mode, row[mode], id=f"{row['failure']}-{row['of']}-{mode}")
    for row in rows("What the client gets")
    for mode in MODELS
    if row[mode] != NEVER
]


def test_every_name_is_explained() -> None:
    explained = {row["name"].strip("`") for row in rows("Names")}
    assert explained == {*KINDS, *OF_REQUESTS}
    assert {case.values[0] for case in CASES} == explained - {*OF_REQUESTS} | {"unauthorized"}
    assert len(CASES) > 90


class Case:
    """A gateway in which something is about to fail."""

    def __init__(self, upstream: FakeUpstream, start: StartGateway, folder: Path) -> None:
        self.upstream, self.start, self.folder = upstream, start, folder
        self.keys: dict[str, Any] = {"modes": {"max_rounds": 1}}
        self.body: dict[str, Any] = {"messages": HELLO}
        self.models: dict[str, dict[str, Any]] = {
            name: {"base_url": upstream.base_url, "model": name} for name in (*MEMBERS, "judge", "synth")
        }
        self.headers: dict[str, str] = {}
        self.holds: list[asyncio.Event] = []
        self.first: list[str] = []  # asked by name before the request, so that they are in the state wanted
        self.occupied: list[str] = []  # likewise, and still at it

    def fail(self, model: str, failure: str) -> None:
        """Makes a model fail in that way."""
        settings, scripts = self.models[model], self.upstream.models
        if failure in FAULTS:
            scripts[model] = FAULTS[failure]
        elif failure == "timeout":
            scripts[model] = Script(hold=self.hold())
            settings["timeout_s"] = 0.1
        elif failure == "unreachable":
            settings["base_url"] = "http://127.0.0.1:9/v1"
        elif failure == "circuit_open":
            scripts[model] = Script(status=500)
            settings["breaker"] = {"failures": 1}
            self.first.append(model)
        elif failure == "queue_full":
            scripts[model] = Script(hold=self.hold())
            settings |= {"max_concurrency": 1, "max_queue": 0}
            self.occupied.append(model)
        elif failure == "cancelled_straggler":
            scripts[model] = Script(hold=self.hold())
            self.keys["modes"] |= {"min_responses": 2, "grace_ms": 10}
        elif failure == "cancelled_hedge":
            scripts[model].faults = [Script(hold=self.hold())]
            settings["hedge_after_ms"] = 10
        elif failure == "budget":
            settings["price"] = DOLLAR
            self.keys["modes"]["max_cost"] = 0.5
        else:
            pytest.fail(f"no way is known to make {failure!r}")

    def hold(self) -> asyncio.Event:
        self.holds.append(asyncio.Event())
        return self.holds[-1]

    async def gateway(self) -> Gateway:
        members = [{"name": name, **self.models[name]} for name in MEMBERS]
        gateway = await self.start(
            members, **{"judge": self.models["judge"], "synthesizer": self.models["synth"], **self.keys}
        )
        gateway.http.headers.update(self.headers)
        return gateway


@pytest.mark.parametrize(("failure", "who", "mode", "cell"), CASES)
async def test_the_client_gets_what_the_page_says(
    start_gateway: StartGateway, upstream: FakeUpstream, tmp_path: Path, failure: str, who: str, mode: str, cell: str
) -> None:
    case = Case(upstream, start_gateway, tmp_path)
    case.body["model"] = MODELS[mode]
    if who in WHO:
        for model in WHO[who]:
            case.fail(model, failure)
    elif who in ("the judge", "the synthesizer"):
        case.fail("judge" if who == "the judge" else "synth", failure)
    elif who == "the judge, and `modes.on_judge_error` is `fail`":
        case.fail("judge", failure)
        case.keys["modes"]["on_judge_error"] = "fail"
    elif who == "the stream, after its first piece":
        case.body["stream"] = True
        last = "alpha" if mode == "a model by its name" else "synth"
        upstream.models[last].break_after = 2 if failure == "upstream_error" else None
        if failure == "timeout":
            upstream.models[last].hold_after, upstream.models[last].hold = 2, case.hold()
            case.models[last]["timeout_s"] = 0.3
    elif who == "the request":
        for model in case.models:
            case.fail(model, failure)
    elif who == "the API key":
        with opened(tmp_path / "traces.sqlite3") as database:
            limits = {"budget": {"max_tokens": 1}, "rate_limited": {"per_minute": 1}, "unauthorized": {}}[failure]
            _, secret = create(database, "someone", **limits)  # type: ignore[arg-type]
        case.headers["authorization"] = f"Bearer {secret if failure != 'unauthorized' else 'mf-none'}"
        if failure == "rate_limited":
            case.first.append("beta")
    elif who == "the client":
        for model in MEMBERS:
            upstream.models[model].hold = case.hold()
    gateway = await case.gateway()
    if failure == "circuit_open" and who in ("the judge", "the synthesizer"):
        case.first = [MODELS[mode]]
    for model in case.first:
        await gateway.post(model=model, messages=HELLO)
    busy = [asyncio.create_task(gateway.post(model=model, messages=HELLO)) for model in case.occupied]
    for model in case.occupied:
        await upstream.wait_asked(model)

    if who == "the client":
        asking = asyncio.create_task(gateway.post(**case.body))
        await upstream.wait_asked("alpha")
        asking.cancel()
        (trace,) = await gateway.first_traces()
        assert (cell, trace["outcome"], trace["answer"]) == ("nothing", "cancelled", None)
        await upstream.wait_aborted("alpha")
        return

    response = await gateway.post(**case.body)
    if who == "the API key":
        assert f"{response.status_code} {response.json()['error']['type']}" == cell
        assert ("retry-after" in response.headers) == (failure == "rate_limited")
        return
    (trace,) = (await gateway.http.get("/v1/traces", params={"limit": 1})).json()["data"]
    if cell.startswith("in the stream: "):
        assert response.status_code == 200
        assert re.search(r'"type": ?"(\w+)"', response.text.rpartition("data: ")[2])[1] == cell.rsplit(maxsplit=1)[-1]  # type: ignore[index]
        assert trace["outcome"] == cell.rsplit(maxsplit=1)[-1]
    elif response.status_code == 200:
        assert f"200 {trace['reason']}" == cell
        assert response.json()["choices"][0]["message"]["content"] == trace["answer"]
    else:
        assert f"{response.status_code} {response.json()['error']['type']}" == cell
        assert trace["outcome"] == cell.rsplit(maxsplit=1)[-1]
    if who != "the request":  # refused before there was a call
        assert failure in {entry["outcome"] for entry in trace["calls"]}
    else:
        assert upstream.requests == []
    for hold in case.holds:
        hold.set()
    await asyncio.gather(*busy)
