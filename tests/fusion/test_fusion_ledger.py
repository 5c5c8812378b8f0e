"""The books balance: for any schedule of failures, what the client is shown is the sum over the trace's calls."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import Gateway, StartGateway, summed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MODELS = ("alpha", "beta", "gamma", "judge", "synth")
PRICE = {"prompt": 3.0, "completion": 5.0}
# Outcomes of attempts that never reached an endpoint.
UNSENT = {"circuit_open", "queue_full", "budget", "unreachable"}
HANG = asyncio.Event()  # never set

FAULTS = {
    "ok": lambda: None,
    "500": lambda: Script(status=500),
    "429": lambda: Script(status=429, headers={"retry-after": "0"}),
    "400": lambda: Script(status=400),
    "cut": lambda: Script(cut=True),
    "invalid": lambda: Script(body=b'{"usage": {"prompt_tokens": 7, "completion_tokens": 3}}'),
    "negative": lambda: Script(body=b'{"usage": {"prompt_tokens": -7, "completion_tokens": 3}}'),
    "refused": lambda: Script(refusal="no"),
    "uncounted": lambda: Script("an answer that nobody counted", usage=None),
    "breaks off": lambda: Script("it ends in the mid", break_after=2),
    "hangs": lambda: Script(hold=HANG),
}
schedules = st.fixed_dictionaries({model: st.lists(st.sampled_from(sorted(FAULTS)), max_size=3) for model in MODELS})


@pytest.fixture
async def gateway(start_gateway: StartGateway, upstream: FakeUpstream) -> Gateway:
    def at(name: str, **keys: Any) -> dict[str, Any]:
        retry = {"attempts": 2, "backoff_ms": 1}
        breaker = {"failures": 4, "cooldown_ms": 1}
        return {
            "base_url": upstream.base_url,
            "model": name,
            "price": PRICE,
            "timeout_s": 0.25,
            "retry": retry,
            "breaker": breaker,
            **keys,
        }

    return await start_gateway(
        [
            {"name": "alpha", **at("alpha", hedge_after_ms=10)},
            {"name": "beta", **at("beta")},
            {"name": "gamma", **at("gamma", max_concurrency=1, max_queue=0)},
        ],
        judge=at("judge"),
        synthesizer=at("synth", hedge_after_ms=10),
        modes={"min_responses": 2, "grace_ms": 15, "deadline_ms": 600, "max_rounds": 1, "max_cost": 0.05},
    )


def last_event(stream: str, key: str) -> dict[str, Any] | None:
    """The last event of a stream that has this key."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return next((event for event in reversed(events) if event.get(key)), None)


@given(
    schedule=schedules,
    model=st.sampled_from(["fusion/best-of", "fusion/merge", "fusion/debate", "alpha"]),
    stream=st.booleans(),
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_usage_is_the_sum_over_the_calls_for_any_schedule_of_failures(
    gateway: Gateway, upstream: FakeUpstream, schedule: dict[str, list[str]], model: str, stream: bool
) -> None:
    upstream.requests.clear()
    for name in MODELS:
        upstream.models[name].faults = [FAULTS[fault]() for fault in schedule[name]]
    response = await gateway.post(
        model=model,
        messages=[{"role": "user", "content": "why?"}],
        max_tokens=50,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    (trace,) = (await gateway.http.get("/v1/traces", params={"limit": 1})).json()["data"]
    calls = trace["calls"]
    expected = summed(trace)

    # What the client is shown.
    if stream and response.status_code == 200:
        if "error" in (last := last_event(response.text, "id") or last_event(response.text, "error") or {}):
            assert last["error"]["type"] == trace["outcome"]
        elif trace["outcome"] == "ok":
            shown = last_event(response.text, "usage")
            assert shown is not None
            assert shown["usage"] == expected
    elif response.status_code == 200:
        assert response.json()["usage"] == expected
    else:
        assert response.json()["error"]["type"] == trace["outcome"]
        assert response.json().get("usage", expected) == expected

    # Every attempt is entered, once, with its price.
    asked = Counter(request["model"] for request in upstream.requests)
    entered = Counter(entry["model"] for entry in calls if entry["outcome"] not in UNSENT)
    left = Counter(entry["model"] for entry in calls if entry["outcome"].startswith(("cancelled", "timeout")))
    for name in MODELS:
        assert asked[name] <= entered[name] <= asked[name] + left[name]
    for entry in calls:
        usage = entry["usage"]
        assert entry["cost"] == pytest.approx((3 * usage["prompt_tokens"] + 5 * usage["completion_tokens"]) / 1e6)
        if entry["outcome"] in UNSENT:
            assert not any(usage.values())
        assert min(usage.values()) >= 0
    # Attempts at one call are numbered without a gap.
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for entry in calls:
        if entry["stage"] != "verdict":
            numbers.setdefault((entry["stage"], entry["member"], entry["candidate"]), []).append(entry["attempt"])
    assert all(sorted(found) == list(range(1, len(found) + 1)) for found in numbers.values())
    # And nothing is left under way.
    metrics = await gateway.metrics()
    assert {value for name, value in metrics.items() if name.startswith("mixfuse_calls_under_way")} <= {0.0}
