"""`mixfuse ask`: what stands in the terminal."""

import asyncio
from io import StringIO

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway
from rich.console import Console

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.config import FusedMode
from mixfuse.fusion.http import ask_client


async def asked(gateway: Gateway, mode: FusedMode = "best_of") -> str:
    shown = StringIO()
    console = Console(file=shown, width=100)
    await asyncio.to_thread(ask_client.ask, "why?", mode=mode, url=gateway.url, max_tokens=9, console=console)
    return shown.getvalue()


async def test_best_of_shows_who_said_what_and_why_it_won(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["gamma"] = Script(status=500)
    shown = await asked(gateway)
    assert shown.startswith("the answer of beta\n")
    assert "[0] alpha\nthe answer of alpha" in shown
    assert "[1] beta (returned)\nthe answer of beta" in shown
    assert "[0] alpha against [1] beta: [1] wins, P(first) 0.10" in shown
    assert "gamma (answer): upstream_error: HTTP 500: status 500" in shown
    assert "beta's answer: the judge preferred it." in shown
    assert "40 + 20 tokens" in shown
    assert "trace-" in shown
    assert upstream.asked("alpha")[0]["max_tokens"] == 9


async def test_merge_and_debate(gateway: Gateway, upstream: FakeUpstream) -> None:
    assert "the synthesizer wrote it" in await asked(gateway, "merge")
    upstream.models["judge"].verdict = lambda _first, _second: 0.9
    upstream.models["judge"].no_logprobs = True
    shown = await asked(gateway, "debate")
    assert "tie (the orders disagree), P(first) 0.50, written" in shown
    assert "debated for 2 rounds; stopped by: max rounds" in shown


async def test_answers_cannot_steer_the_terminal(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["beta"].text = "beta \x1b[2J[bold]markup[/bold]\x9b31m\n\tend"
    shown = await asked(gateway)
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "[bold]markup[/bold]" in shown


async def test_errors_are_one_line(gateway: Gateway, upstream: FakeUpstream) -> None:
    with pytest.raises(MixfuseError, match="is it running"):
        ask_client.ask("why?", url="http://127.0.0.1:9")
    upstream.models["synth"].break_after = 2
    with pytest.raises(MixfuseError, match="broke off"):
        await asked(gateway, "merge")
    for name in ("alpha", "beta", "gamma"):
        upstream.models[name] = Script(status=500)
    with pytest.raises(MixfuseError, match="alpha: upstream_error") as caught:
        await asked(gateway)
    assert caught.value.kind == "too_few_answers"


async def test_a_missing_key_says_where_it_comes_from(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(api_keys="required")
    with pytest.raises(MixfuseError, match="as a bearer token: set MIXFUSE_API_KEY"):
        await asked(gateway)


async def test_why_the_judge_failed_and_what_it_wrote_are_shown(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.models["judge"] = Script(status=500)
    shown = " ".join((await asked(gateway)).split())
    assert "the judge failed, so the first member's answer is returned" in shown
    assert "judge (verdict): upstream_error: HTTP 500: status 500" in shown
    upstream.models["judge"] = Script("I cannot choose\x1b[2J.")  # no verdict, and no log-probabilities
    shown = " ".join((await asked(gateway)).split())
    assert "the judge wrote: I cannot choose" in shown
    assert "\x1b" not in shown


async def test_how_sure_auto_is_and_why_it_stopped_are_shown(gateway: Gateway) -> None:
    shown = await asked(gateway, "auto")
    assert "confidence 0." in shown
    assert "no further member was asked: " in shown
