"""What a request would cost in each mode, and how long it would take: before it is sent.

The most is worked out from the request, the pool and the prices, without retries and hedges. What is expected is the
mean over recent traces of the same mode: how often each model was called, and how much it read and wrote beside the
conversation.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any

from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.answering.pairwise_judge import FINALISTS
from mixfuse.fusion.answering.request import Plan
from mixfuse.fusion.calls.ledger import UNLIMITED_COMPLETION, prompt_tokens
from mixfuse.fusion.calls.pool import estimate
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.modes.merge import ANALYSIS_TOKENS
from mixfuse.fusion.modes.registry import ending_mode, mode_named

FEWEST_TRACES = 5
"""With fewer traces of a mode nothing is expected of it."""

# Tokens that a judge's and a synthesizer's instructions take, rounded up.
_INSTRUCTIONS = 500


def quote(
    plan_in: Callable[[str], Plan], modes: Sequence[str], traces: Mapping[str, Sequence[Trace]]
) -> dict[str, Any]:
    """Returns the quotes of a request.

    Args:
        plan_in: Plans the request in a mode.
        modes: The modes, the one asked for first.
        traces: Recent traces of each mode.
    """
    quotes = []
    for mode in modes:
        try:
            plan = plan_in(mode)
        except RequestError as error:
            quotes.append({"mode": mode, "unavailable": str(error)})
            continue
        quotes.append({"mode": mode, **_most(plan), **_expected(plan, traces[mode])})
    return {"object": "fusion.quote", "quotes": quotes}


def _most(plan: Plan) -> dict[str, Any]:
    """Returns the most calls, dollars and milliseconds that a plan takes."""
    conversation = prompt_tokens(plan.messages, plan.parameters)
    written = plan.parameters.get("max_completion_tokens") or plan.parameters.get("max_tokens") or UNLIMITED_COMPLETION
    shown = min(written, plan.settings.max_candidate_chars)
    answers = [(member, estimate(member, plan.messages, plan.parameters).cost) for member in plan.members]
    count = sum(member.samples for member in plan.members)
    calls, cost = count, sum(member.samples * one for member, one in answers)

    def add(number: int, model: ModelConfig, extra: int, completion: int) -> None:
        nonlocal calls, cost
        calls += number
        cost += number * model.price.cost(conversation + extra + _INSTRUCTIONS, completion)

    if mode_named(plan.mode).debates:
        for member in plan.members:
            add(plan.settings.max_rounds * member.samples, member, count * shown, written)
    ending = ending_mode(plan.mode, plan.settings)
    if plan.judge is not None and count > 1 and (ending.needs == "judge" or plan.mode == "auto"):
        pairs = count + 2 if count > FINALISTS else count * (count - 1) // 2
        if isinstance(plan.judge, Judge) and plan.judge.kind == "reward":
            add(count, plan.judge, shown, 0)
        else:
            add(2 * pairs, plan.judge, 2 * shown, plan.judge.max_tokens or UNLIMITED_COMPLETION)
    if plan.synthesizer is not None and count > 1 and ending.needs == "synthesizer":
        add(1, plan.synthesizer, count * shown, written)
        if plan.settings.analysis:
            add(1, plan.synthesizer, count * shown, plan.synthesizer.max_tokens or ANALYSIS_TOKENS)
    if plan.settings.max_cost is not None:
        cost = min(cost, plan.settings.max_cost)
    return {"most": {"calls": calls, "cost": cost, "latency_ms": plan.settings.deadline_ms}}


def _expected(plan: Plan, traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns what recent traces of the mode let one expect; None with too few of them."""
    whole = [trace for trace in traces if trace.outcome == "ok" and trace.cached_from is None and trace.calls]
    if len(whole) < FEWEST_TRACES:
        return {"expected": None, "traces": len(whole)}
    conversation = prompt_tokens(plan.messages, plan.parameters)
    models: dict[str, ModelConfig] = {member.name: member for member in plan.members}
    models |= {name: model for name, model in (("judge", plan.judge), ("synthesizer", plan.synthesizer)) if model}
    seen: dict[tuple[str, str], list[tuple[Trace, Call]]] = defaultdict(list)
    for trace in whole:
        for call in trace.calls:
            if call.member in models:
                seen[call.stage, call.member].append((trace, call))
    calls = cost = 0.0
    for (_, name), found in seen.items():
        # A trace may be of a pool without this member.
        able = [trace for trace in whole if name not in _members(plan) or name in trace.candidates]
        each = len(found) / len(able)
        extra = mean(call.usage.prompt_tokens - _conversation(trace) for trace, call in found)
        completion = mean(call.usage.completion_tokens for _, call in found)
        calls += each
        cost += each * models[name].price.cost(max(0, round(conversation + extra)), round(completion))
    times = [trace.duration_ms for trace in whole]
    return {
        "expected": {
            "calls": calls,
            "cost": cost,
            "latency_ms": median(times),
            "latency_p95_ms": quantiles(times, n=20)[-1],
        },
        "traces": len(whole),
    }


def _members(plan: Plan) -> set[str]:
    return {member.name for member in plan.members}


def _conversation(trace: Trace) -> int:
    """Returns the tokens of a trace's conversation: the least that a call for an answer read."""
    return min((call.usage.prompt_tokens for call in trace.calls if call.stage == "answer"), default=0)
