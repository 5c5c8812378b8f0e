"""`mixfuse ask`: one fused answer in the terminal, with the candidates and why the answer won."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import model_name
from mixfuse.fusion.calls.responses import split_events
from mixfuse.fusion.config import FusedMode
from mixfuse.fusion.http.keys import API_KEY

# Answers are untrusted: control characters, which could steer the terminal, are replaced; tabs and newlines stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

REASONS = {
    "weighed": "it is the likeliest of the answers, by who gave them",
    "judged": "the judge preferred it",
    "agreement": "all members agree; the judge was not called",
    "lone_survivor": "it is the only answer",
    "judge_failed": "the judge failed, so the first member's answer is returned",
    "primary": "with tools the first member answers alone",
    "pass_through": "the request named this model",
    "synthesis": "the synthesizer wrote it from the candidates",
    "synthesizer_failed": "the synthesizer failed, so the first member's answer is returned",
}
"""The reasons of traces in words."""


def ask(
    prompt: str,
    *,
    mode: FusedMode = "best_of",
    url: str = "http://127.0.0.1:8080",
    api_key: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    console: Console | None = None,
) -> None:
    """Asks a running gateway; prints the answer while it is written, then how it was made.

    Raises:
        MixfuseError: The gateway cannot be reached or answers with an error.
    """
    console = console or Console()
    body = {
        "model": model_name(mode),
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "fusion": {"expose": "full"},
        **({} if temperature is None else {"temperature": temperature}),
        **({} if max_tokens is None else {"max_tokens": max_tokens}),
    }
    fusion: dict[str, Any] = {}
    usage: dict[str, int] = {}
    for event in _events(url, api_key, body):
        if "error" in event:
            console.print()
            raise _error(event["error"])
        for choice in event.get("choices", []):
            console.out(_safe(choice["delta"].get("content") or ""), end="", highlight=False)
        fusion = event.get("fusion") or fusion
        usage = event.get("usage") or usage
    console.print("\n")
    show(fusion, usage, console)


def show(fusion: dict[str, Any], usage: dict[str, int], console: Console) -> None:
    """Prints a `fusion` block: the candidates, the verdicts, and the reason of the answer.

    Args:
        fusion: The block as the gateway sent it.
        usage: The tokens of all calls together.
        console: The console to print on.
    """
    names = {candidate["candidate"]: candidate["member"] for candidate in fusion.get("candidates", [])}
    console.print(Rule("candidates", align="left"))
    for candidate in fusion.get("candidates", []):
        mark = " (returned)" if candidate["candidate"] == fusion.get("winner") else ""
        console.print(Text(f"[{candidate['candidate']}] {candidate['member']}{mark}", style="bold"))
        console.print(Text(_safe(candidate["text"])))
    if fusion.get("verdicts"):
        console.print(Rule("verdicts, both orders", align="left"))
    for verdict in fusion.get("verdicts", []):
        console.print(Text(_verdict_line(verdict, names)))
    for call in fusion.get("calls", []):
        if call["stage"] == "verdict" and len((text := call.get("text") or "").split()) > 1:
            console.print(Text(_safe(f"the judge wrote: {text.strip()}"), style="dim"))
    if debate := fusion.get("debate"):
        ended = debate["stopped"].replace("_", " ")
        console.print(Text(f"debated for {debate['rounds']} rounds; stopped by: {ended}"))
    for failure in fusion.get("failed", []):
        line = f"{failure['member']} ({failure['stage']}): {failure['type']}: {failure['message']}"
        console.print(Text(_safe(line), style="yellow"))
    console.print(Rule("why", align="left"))
    winner = fusion.get("winner")
    owner = f"{names[winner]}'s answer: " if winner in names else ""
    reason = str(fusion.get("reason"))
    console.print(Text(f"{owner}{REASONS.get(reason, reason)}."))
    if problem := fusion.get("error"):
        console.print(Text(_safe(str(problem)), style="yellow"))
    if (confidence := fusion.get("confidence")) is not None:
        stopped = str(fusion.get("stopped")).replace("_", " ")
        low = ", which is too low" if fusion.get("low_confidence") else ""
        console.print(Text(f"confidence {confidence:.2f}{low}; no further member was asked: {stopped}"))
    tokens = f"{usage.get('prompt_tokens', 0)} + {usage.get('completion_tokens', 0)} tokens"
    console.print(Text(f"{tokens}, ${fusion.get('cost', 0):.6f}, trace {fusion.get('trace_id')}", style="dim"))


def _verdict_line(verdict: dict[str, Any], names: dict[int, str]) -> str:
    first, second = verdict["first"], verdict["second"]
    pair = f"[{first}] {names.get(first, '?')} against [{second}] {names.get(second, '?')}"
    if verdict["winner"] == "tie":
        cause = "unreadable" if verdict["parse_failures"] else "the orders disagree"
        outcome = f"tie ({cause})"
    else:
        outcome = f"[{verdict[verdict['winner']]}] wins"
    written = ", written" if verdict.get("read") == "parsed" else ""
    return f"{pair}: {outcome}, P(first) {verdict['score']:.2f}{written}"


def _events(url: str, api_key: str | None, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    endpoint = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    timeout = httpx.Timeout(None, connect=10)
    try:
        with httpx.stream("POST", endpoint, json=body, headers=headers, timeout=timeout) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                error = _error_object(response)
                if response.status_code == httpx.codes.UNAUTHORIZED and not api_key:
                    error["message"] = f"{error.get('message')}: set {API_KEY}"
                raise _error(error)
            rest = b""
            for part in response.iter_bytes():
                events, rest = split_events(rest + part)
                for data in events:
                    if data != b"[DONE]":
                        yield json.loads(data)
    except httpx.ConnectError as error:
        raise MixfuseError(f"no gateway answers at {url} ({error}); is it running?", kind="unreachable") from None
    except httpx.HTTPError as error:
        raise MixfuseError(f"the connection to {url} broke: {error}", kind="upstream_error") from None


def _error_object(response: httpx.Response) -> dict[str, Any]:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {"message": f"HTTP {response.status_code}", "type": "upstream_error"}
    return error if isinstance(error, dict) else {"message": str(error)}


def _error(error: dict[str, Any]) -> MixfuseError:
    return MixfuseError(str(error.get("message")), kind=str(error.get("type") or "upstream_error"))


def _safe(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
