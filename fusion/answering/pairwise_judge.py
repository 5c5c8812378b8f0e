"""The judge: pairs of candidates, each in both orders, each verdict one prefill-only call, all of a round at once.

Up to four candidates all meet. Of more, knock-out rounds leave four, who then all meet: n candidates make n + 2 pairs,
and one that the judge prefers to every other still comes out first. How a comparison is written and its verdict read
is `mixfuse.contracts.judge_protocol`'s.
"""

import asyncio
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, Self

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import (
    MAX_CHARS,
    VERDICTS,
    combine,
    comparison,
    explained,
    new_nonce,
    read_explained,
    read_verdict,
    shown,
)
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.agreement import distinct, tool_call_text
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.request import Run
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, Endpoint, Purpose, call, first_token_logprobs
from mixfuse.fusion.config import Judge, ModelConfig
from mixfuse.fusion.messages import question

FINALISTS = 4

# One token is enough: the verdict is read from its alternatives; 20 is the most OpenAI and vLLM give.
VERDICT_PARAMETERS = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}

WRITTEN = 'Reply with a JSON object: {"verdict": "A"} or {"verdict": "B"}.'
# Room for a little more than the object: some models put it behind a fence or a word.
WRITTEN_PARAMETERS: dict[str, Any] = {
    "max_tokens": 64,
    "temperature": 0,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"verdict": {"type": "string", "enum": list(VERDICTS)}},
                "required": ["verdict"],
                "additionalProperties": False,
            },
        },
    },
}
# Two sentences and the verdict; a rationale that runs on is no verdict.
EXPLAINED_PARAMETERS: dict[str, Any] = {"max_tokens": 256, "temperature": 0}
_WRITTEN = re.compile(r'\{\s*"verdict"\s*:\s*"([AB])"\s*\}')


class JudgeError(MixfuseError):
    """The judge could not be asked, or none of its verdicts could be read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="judge_failed")


class NoLogprobsError(CallError):
    """The judge's endpoint answers, but without log-probabilities."""

    def __init__(self) -> None:
        super().__init__("invalid_response", "the judge's endpoint gives no log-probabilities")


class View(NamedTuple):
    """One order of one pair: P(the answer shown first is better), None if unreadable; and what it was read from."""

    p: float | None
    read: Literal["logprobs", "parsed"]


class Court:
    """The judge at work on one request; an async context manager where it is to begin early.

    Args:
        run: The request; takes the verdicts.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._heard: set[tuple[int, int]] = set()
        self._hearings: list[asyncio.Task[tuple[str, list[Verdict]]]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        left = kind is not None and issubclass(kind, asyncio.CancelledError)
        for hearing in self._hearings:
            hearing.cancel("cancelled" if left else "cancelled_straggler")
        await asyncio.gather(*self._hearings, return_exceptions=True)

    def hear(self, candidates: Sequence[Candidate]) -> None:
        """Has these compared while the grace for others lasts, if they will meet in any case."""
        run = self._run
        if run.plan.judge is None or len(run.names) > FINALISTS:
            return
        rivals = distinct(candidates, run.agreement)
        pairs = [pair for pair in combinations(rivals, 2) if _indices(pair) not in self._heard]
        if pairs:
            self._heard.update(map(_indices, pairs))
            self._hearings.append(asyncio.create_task(self._hearing(run.plan.judge, pairs)))

    async def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Finds the best candidate; the verdicts go into the run.

        One adapter revision gives all verdicts of a request: those of an earlier one do not count.

        Raises:
            JudgeError: There is no judge, a call failed (the others are cancelled then), or none of the verdicts
                could be read.
        """
        run, model = self._run, self._run.plan.judge
        if model is None:
            raise JudgeError("no judge is configured")
        rivals = list(candidates)
        try:
            async with run.pool.lease(model, _purpose(model), run.ledger) as endpoint:
                known: dict[tuple[int, int], Verdict] = {}
                for hearing in self._hearings:
                    judged_by, verdicts = await hearing
                    if judged_by == endpoint.model:
                        known |= {(verdict_.first, verdict_.second): verdict_ for verdict_ in verdicts}
                while len(rivals) > FINALISTS:
                    round_ = await compare(run, model, endpoint, knock_out_pairs(rivals))
                    run.verdicts.extend(round_)
                    rivals = survivors(rivals, round_)
                pairs = list(combinations(rivals, 2))
                new = await compare(run, model, endpoint, [pair for pair in pairs if _indices(pair) not in known])
        except CallError as failure:
            raise JudgeError(str(failure)) from failure
        known |= {(verdict_.first, verdict_.second): verdict_ for verdict_ in new}
        final = [known[_indices(pair)] for pair in pairs]
        run.verdicts.extend(final)
        if all(verdict_.parse_failures == len(VERDICTS) for verdict_ in run.verdicts):
            run.verdicts.clear()
            raise JudgeError("none of the judge's replies names a verdict")
        return ranking(final, rivals)[0]

    async def _hearing(
        self, model: ModelConfig, pairs: Sequence[tuple[Candidate, Candidate]]
    ) -> tuple[str, list[Verdict]]:
        """(the judge's model at its endpoint, what it said of the pairs)."""
        run = self._run
        async with run.pool.lease(model, _purpose(model), run.ledger) as endpoint:
            return endpoint.model, await compare(run, model, endpoint, pairs)


def _purpose(model: ModelConfig) -> Purpose:
    return Purpose("verdict", "judge", price=model.price, timeout_s=model.timeout_s)


def _indices(pair: tuple[Candidate, Candidate]) -> tuple[int, int]:
    return pair[0].index, pair[1].index


def knock_out_pairs(rivals: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Who meets whom in a knock-out round: so many pairs that half, or `FINALISTS`, are left.

    Where not all meet, the first in candidate order go through: it is the order that settles ties, too.
    """
    pairs = len(rivals) - max(FINALISTS, (len(rivals) + 1) // 2)
    meeting = rivals[len(rivals) - 2 * pairs :]
    return list(zip(meeting[::2], meeting[1::2], strict=True))


def survivors(rivals: Sequence[Candidate], verdicts: Sequence[Verdict]) -> list[Candidate]:
    """Who is left after a knock-out round; a tie goes to the higher mean probability, then to the earlier one."""

    def loser(verdict_: Verdict) -> int:
        second_won = verdict_.winner == "second" or (verdict_.winner == "tie" and verdict_.score < 0.5)
        return verdict_.first if second_won else verdict_.second

    lost = {loser(verdict_) for verdict_ in verdicts}
    return [rival for rival in rivals if rival.index not in lost]


def ranking(verdicts: Sequence[Verdict], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Orders candidates, best first: by pairs won, then by mean score, then by candidate order."""
    wins = {candidate.index: 0 for candidate in candidates}
    scores: dict[int, list[float]] = {candidate.index: [] for candidate in candidates}
    for verdict_ in verdicts:
        if verdict_.winner != "tie":
            wins[verdict_.first if verdict_.winner == "first" else verdict_.second] += 1
        scores[verdict_.first].append(verdict_.score)
        scores[verdict_.second].append(1.0 - verdict_.score)

    def place(candidate: Candidate) -> tuple[int, float, int]:
        own = scores[candidate.index]
        return -wins[candidate.index], -(sum(own) / len(own) if own else 0.0), candidate.index

    return sorted(candidates, key=place)


async def verdict(
    client: Client,
    endpoint: Endpoint,
    question: str,
    first: str,
    second: str,
    *,
    purpose: Purpose,
    ledger: Ledger,
    nonce: str | None = None,
    max_chars: int = MAX_CHARS,
) -> float | None:
    """Judges one pair in one order, by log-probabilities.

    Args:
        client: Shared by all calls.
        endpoint: The judge's.
        question: What was asked.
        first: The answer shown as A.
        second: The answer shown as B.
        purpose: For the ledger.
        ledger: Takes the call.
        nonce: Of the fences, where several comparisons share one; unset: a fresh one.
        max_chars: The most of each answer to show.

    Returns:
        The probability that the answer shown first is the better one; None where no verdict could be read.

    Raises:
        NoLogprobsError: The endpoint gives none.
        CallError: The call failed.
    """
    nonce = nonce or new_nonce(question, first, second)
    messages = comparison(question, first, second, nonce=nonce, max_chars=max_chars)
    try:
        reply = await call(client, endpoint, messages, VERDICT_PARAMETERS, purpose=purpose, ledger=ledger)
    except CallError as failure:
        # Some endpoints refuse the parameter by name instead of ignoring it.
        if failure.kind == "upstream_error" and "HTTP 4" in str(failure) and "logprobs" in str(failure):
            raise NoLogprobsError from failure
        raise
    if not reply.logprobs:
        raise NoLogprobsError
    return read_verdict(first_token_logprobs(reply.logprobs))


async def written_verdict(
    client: Client,
    endpoint: Endpoint,
    question: str,
    first: str,
    second: str,
    *,
    purpose: Purpose,
    ledger: Ledger,
    nonce: str,
    max_chars: int = MAX_CHARS,
) -> float | None:
    """Judges one pair in one order, by a JSON object that the judge writes; arguments as for `verdict`.

    Returns:
        1 or 0, for the answer shown first or second; None where no verdict could be read.

    Raises:
        CallError: The call failed.
    """
    messages = comparison(question, first, second, nonce=nonce, max_chars=max_chars)
    messages[-1]["content"] += f"\n{WRITTEN}"
    reply = await call(client, endpoint, messages, WRITTEN_PARAMETERS, purpose=purpose, ledger=ledger)
    said = _WRITTEN.findall(reply.text)
    # Both verdicts in one reply are none.
    return float(said[0] == VERDICTS[0]) if len(set(said)) == 1 else None


async def explained_verdict(
    client: Client,
    endpoint: Endpoint,
    question: str,
    first: str,
    second: str,
    *,
    purpose: Purpose,
    ledger: Ledger,
    nonce: str,
    max_chars: int = MAX_CHARS,
) -> float | None:
    """Judges one pair in one order, by what the judge's rationale ends with; arguments as for `verdict`.

    Returns:
        1 or 0, for the answer shown first or second; None where no verdict could be read.

    Raises:
        CallError: The call failed.
    """
    messages = explained(comparison(question, first, second, nonce=nonce, max_chars=max_chars))
    reply = await call(client, endpoint, messages, EXPLAINED_PARAMETERS, purpose=purpose, ledger=ledger)
    said = read_explained(reply.text)
    return None if said is None else float(said == VERDICTS[0])


async def compare(
    run: Run, model: ModelConfig, endpoint: Endpoint, pairs: Sequence[tuple[Candidate, Candidate]]
) -> list[Verdict]:
    """Has pairs judged in both orders, all at once.

    Raises:
        CallError: A call failed; the others are cancelled then.
    """
    if not pairs:
        return []
    purpose = _purpose(model)
    asked = question(run.plan.messages)
    most = run.plan.settings.max_candidate_chars
    how = model.verdicts if isinstance(model, Judge) else "auto"
    known = (endpoint.base_url, endpoint.model)
    client, ledger = run.pool.client, run.ledger
    written = {one.index: shown(_as_text(one), most) for pair in pairs for one in pair}
    # One for all: the judge's engine then finds the question, and each answer shown first, in its prefix cache.
    nonce = new_nonce(asked, *written.values())

    async def view(one: Candidate, other: Candidate) -> View:
        """One order of one pair, read as the judge's endpoint allows."""
        texts = (asked, written[one.index], written[other.index])
        if how == "logprobs" or (how == "auto" and known not in run.pool.without_logprobs):
            try:
                p = await verdict(client, endpoint, *texts, purpose=purpose, ledger=ledger, nonce=nonce, max_chars=most)
                return View(p, "logprobs")
            except NoLogprobsError:
                if how == "logprobs":
                    raise
                run.pool.without_logprobs.add(known)
        write = explained_verdict if how == "rationale" else written_verdict
        p = await write(client, endpoint, *texts, purpose=purpose, ledger=ledger, nonce=nonce, max_chars=most)
        return View(p, "parsed")

    orders = [view(one, other) for pair in pairs for one, other in (pair, pair[::-1])]
    views = all_or_raise(await fan_out(orders, quorum=len(orders)))
    verdicts: list[Verdict] = []
    for (first, second), forward, backward in zip(pairs, views[::2], views[1::2], strict=True):
        outcome = combine(forward.p, backward.p, endpoint.calibration)
        read: Literal["logprobs", "parsed"] = "parsed" if "parsed" in (forward.read, backward.read) else "logprobs"
        verdicts.append(Verdict(first=first.index, second=second.index, read=read, **outcome._asdict()))
    return verdicts


def _as_text(candidate: Candidate) -> str:
    """A candidate as the judge reads it: its text, and what it would call."""
    calls = [f"calls the tool {tool_call_text(call)}" for call in candidate.tool_calls or ()]
    return "\n".join([candidate.text, *calls] if candidate.text else calls)
