"""A trace as people read it: its candidates, its calls in time, its verdicts in words, and the prompts."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Call, Trace, Verdict
from mixfuse.fusion.answering.agreement import text_key
from mixfuse.fusion.answering.citations import INSTRUCTION
from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.modes.debate import revision_prompt
from mixfuse.fusion.modes.merge import UNMARKED, prompt_of
from mixfuse.fusion.store.trace_facts import CUT_OFF
from mixfuse.fusion.ui.texts import percent

REASONS = {
    "judged": "The judge compared the answers in pairs, and this one came out first.",
    "agreement": "The members gave the same answer; nothing was left to judge.",
    "lone_survivor": "Only one answer was in hand.",
    "judge_failed": "The judge failed; the first answer in the config's order was returned.",
    "synthesis": "The synthesizer wrote one answer from the members' answers.",
    "synthesizer_failed": "The synthesizer failed; a member's answer was returned.",
    "weighed": "This answer weighs most, by what each member got right before, or by votes.",
    "pass_through": "The model was asked for by its name.",
    "primary": "The first member answered alone, because the request offers tools.",
}
STOPPED = {
    "target": "it was as sure as was asked for",
    "not_worth_more": "no further member was worth its price",
    "all_asked": "every member had been asked",
    "budget": "the budget allowed no more",
    "deadline": "the deadline came",
    "explore": "all were asked at once, to learn from it",
    "agreement": "the members agree",
    "max_rounds": "the most rounds were reached",
}
_MOST_BARS = 200
_MOST_DIFFERENCE = 20_000  # characters
_UNSHOWN = "the conversation has a form that this version does not show"


@dataclass(frozen=True)
class Shown:
    """One candidate.

    Attributes:
        index: Its number.
        member: Who gave it.
        text: Its answer; None if it gave none.
        call: The call that brought it, or the last one that failed.
        votes: How many candidates give an equal answer, this one included.
        group: The number of its class of equal answers, from 0.
        won: Whether it was returned.
    """

    index: int
    member: str
    text: str | None
    call: Call | None
    votes: int
    group: int
    won: bool


@dataclass(frozen=True)
class Cell:
    """One cell of the verdict matrix: the row's candidate against the column's.

    Attributes:
        score: The probability that the row's is better.
        orders: That of each order: the row's shown as A, the row's shown as B; None if it was not read or not kept.
        kind: `good`, `bad` or `warn`: the row's won, lost, or neither.
    """

    score: float
    orders: tuple[float | None, float | None]
    kind: str


@dataclass(frozen=True)
class Bar:
    """One call in the timeline, in units of the drawing.

    Attributes:
        call: The call.
        x: Where it begins; and its width, and its row's top.
        width: …
        y: …
        kind: Its classes in the style sheet.
        label: It in words.
    """

    call: Call
    x: float
    width: float
    y: float
    kind: str
    label: str


def candidates(trace: Trace, config: FusionConfig) -> list[Shown]:
    """Returns the candidates in order; equal answers by the config's rule, or as mode `auto` grouped them."""
    calls: dict[int, Call] = {}
    for call in trace.calls:
        if call.candidate is not None and call.stage in ("answer", "revision"):
            known = calls.get(call.candidate)
            if known is None or call.outcome == "ok" or known.outcome != "ok":
                calls[call.candidate] = call
    groups: dict[str, list[int]] = {}
    if trace.weighing is not None:
        groups = {str(place): list(of.candidates) for place, of in enumerate(trace.weighing.classes)}
    else:
        for index, call in sorted(calls.items()):
            if call.outcome == "ok" and call.text is not None:
                groups.setdefault(text_key(call.text, config.modes.agreement), []).append(index)
    group_of = {index: (place, len(group)) for place, group in enumerate(groups.values()) for index in group}
    shown = []
    for index, member in enumerate(trace.candidates):
        found = calls.get(index)
        text = found.text if found is not None and found.outcome == "ok" else None
        group, votes = group_of.get(index, (-1, 0))
        shown.append(Shown(index, member, text, found, votes, group, trace.winner == index))
    return shown


def matrix(trace: Trace) -> dict[tuple[int, int], Cell]:
    """Returns the verdicts by (row's candidate, column's candidate)."""
    cells: dict[tuple[int, int], Cell] = {}
    for verdict in trace.verdicts:
        first, second = verdict.orders or (None, None)
        against = (None if second is None else 1 - second, None if first is None else 1 - first)
        kinds = {"first": ("good", "bad"), "second": ("bad", "good"), "tie": ("warn", "warn")}[verdict.winner]
        cells[verdict.first, verdict.second] = Cell(verdict.score, (first, second), kinds[0])
        cells[verdict.second, verdict.first] = Cell(1 - verdict.score, against, kinds[1])
    return cells


def explained(verdict: Verdict, members: Sequence[str]) -> str:
    """Returns a verdict in words."""
    first, second = (_named(index, members) for index in (verdict.first, verdict.second))
    how = {
        "logprobs": "by the probability of its first token",
        "parsed": "by the letter that it wrote",
        "scores": "by the scores of a reward model",
    }[verdict.read]
    said = f"The judge prefers {first} to {second} with {percent(verdict.score)}, read {how}."
    if verdict.orders is not None:
        shown = ["could not be read" if order is None else percent(order) for order in verdict.orders]
        said += f" With {first} shown first: {shown[0]}; with {second} shown first: {shown[1]}."
    if verdict.winner != "tie":
        won = first if verdict.winner == "first" else second
        return f"{said} So {won} is better" + ("; both orders say so." if verdict.consistent else ".")
    if verdict.parse_failures:
        return f"{said} {verdict.parse_failures} of its two replies could not be read, so it is a tie."
    if not verdict.consistent:
        return f"{said} The two orders name different answers: it went by their place, so it is a tie."
    return f"{said} That is too close to one half, so it is a tie."


def timeline(trace: Trace, width: float = 700.0) -> tuple[list[Bar], float]:
    """Returns the calls as bars in the order in which they began, and the drawing's height."""
    whole = max([trace.duration_ms, *(call.started_ms + call.duration_ms for call in trace.calls)], default=0.0) or 1.0
    bars = []
    for row, call in enumerate(sorted(trace.calls, key=lambda call: call.started_ms)[:_MOST_BARS]):
        ended = "" if call.outcome == "ok" else " cancelled" if call.outcome in CUT_OFF else " failed"
        label = f"{call.member}: {call.stage}" + (f", attempt {call.attempt}" if call.attempt > 1 else "")
        label += f", {call.outcome}" if ended else ""
        x = width * max(0.0, call.started_ms) / whole
        long = max(2.0, width * call.duration_ms / whole)
        bars.append(Bar(call, x, min(long, width - x + 2), 24.0 * row, f"bar {call.stage}{ended}", label))
    return bars, 24.0 * len(bars) + 20


def tree(trace: Trace) -> list[tuple[str, list[Call]]]:
    """Returns the calls by stage, in the order in which stages began."""
    stages: dict[str, list[Call]] = {}
    for call in sorted(trace.calls, key=lambda call: call.started_ms):
        stages.setdefault(call.stage, []).append(call)
    return list(stages.items())


def prompts(trace: Trace, config: FusionConfig) -> list[tuple[str, Any]]:
    """Returns the prompts of a trace as (what for, messages).

    What judges, synthesizers and the members of a debate were sent is written again from the stored texts, by today's
    config: the random digits of its marks differ, and a combiner may have shown answers in another order.
    """
    if not trace.messages:
        return []
    found: list[tuple[str, Any]] = [("Sent to the members", trace.messages)]
    texts = {shown.index: shown.text for shown in candidates(trace, config) if shown.text is not None}
    for verdict in trace.verdicts:
        for a, b in ((verdict.first, verdict.second), (verdict.second, verdict.first)):
            if a in texts and b in texts:
                title = f"Sent to the judge: {_named(a, trace.candidates)} as A, {_named(b, trace.candidates)} as B"
                found.append((title, _written(_comparison, trace, texts[a], texts[b], config)))
    return found + _revisions(trace, config) + _syntheses(trace, texts, config)


def _revisions(trace: Trace, config: FusionConfig) -> list[tuple[str, Any]]:
    """Returns what the members were sent in each further round of a debate."""
    if trace.debate is None:
        return []
    members = {member.name: member for member in config.members}
    found: list[tuple[str, Any]] = []
    for number, before in enumerate(trace.debate.rounds[:-1], start=1):
        for own in before:
            name = _member(own.candidate, trace.candidates)
            others = [turn.text for turn in before if turn.candidate != own.candidate]
            title = f"Sent to {_named(own.candidate, trace.candidates)} in round {number} of the debate"
            most = config.modes.max_candidate_chars
            found.append(
                (
                    title,
                    _written(
                        revision_prompt, trace.messages, own.text, others, member=members.get(name), max_chars=most
                    ),
                )
            )
    return found


def _syntheses(trace: Trace, texts: Mapping[int, str], config: FusionConfig) -> list[tuple[str, Any]]:
    """Returns what the synthesizer was sent: for its analysis, and for the answer."""
    stages = {call.stage for call in trace.calls}
    answers = list({text_key(text, "exact"): text for text in reversed(list(texts.values()))}.values())[::-1]
    how: dict[str, Any] = {"model": config.synthesizer, "max_chars": config.modes.max_candidate_chars}
    found: list[tuple[str, Any]] = []
    if "analysis" in stages:
        title = "Sent to the synthesizer for its analysis"
        found.append((title, _written(prompt_of, trace.messages, answers, form=None, **how)))
    if "synthesis" in stages:
        form = UNMARKED if trace.citations is None else INSTRUCTION
        given = {**how, "form": form, "analysis": trace.analysis}
        found.append(("Sent to the synthesizer", _written(prompt_of, trace.messages, answers, **given)))
    return found


def _written(write: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """A prompt that is written again; says so where a conversation of another version has no form for it."""
    try:
        return write(*arguments, **keywords)
    except (KeyError, TypeError, AttributeError, MixfuseError):
        return _UNSHOWN


def _comparison(trace: Trace, first: str, second: str, config: FusionConfig) -> Any:
    messages = trace.messages
    lone = len(messages) == 1 and messages[0].get("role") == "user"
    question = judge_protocol.text_of(messages[0]["content"]) if lone else messages
    nonce = judge_protocol.new_nonce(judge_protocol.as_question(messages), first, second)
    most = config.modes.max_candidate_chars
    return judge_protocol.comparison(question, first, second, nonce=nonce, max_chars=most)


def difference(one: str, other: str) -> list[tuple[str, str]]:
    """Returns the lines of two texts with what happened to each: `same`, `gone` or `new`."""
    if len(one) + len(other) > _MOST_DIFFERENCE:
        return []
    kinds = {"  ": "same", "- ": "gone", "+ ": "new"}
    lines = difflib.ndiff(one.splitlines(), other.splitlines())
    return [(kinds[line[:2]], line[2:]) for line in lines if line[:2] in kinds]


def _member(index: int, members: Sequence[str]) -> str:
    return members[index] if 0 <= index < len(members) else "?"


def _named(index: int, members: Sequence[str]) -> str:
    name = _member(index, members)
    return f"{name} (candidate {index})" if list(members).count(name) > 1 else name


def view(trace: Trace, config: FusionConfig) -> dict[str, Any]:
    """Returns what the templates show of a trace."""
    bars, height = timeline(trace)
    shown = candidates(trace, config)
    judged = sorted({index for verdict in trace.verdicts for index in (verdict.first, verdict.second)})
    return {
        "trace": trace,
        "member": lambda index: _member(index, trace.candidates),
        "shown": shown,
        "groups": len({one.group for one in shown if one.group >= 0}),
        "matrix": matrix(trace),
        "judged": judged,
        "explained": [explained(verdict, trace.candidates) for verdict in trace.verdicts],
        "bars": bars,
        "height": height,
        "tree": tree(trace),
        "why": REASONS.get(trace.reason, ""),
        "stopped": STOPPED,
    }
