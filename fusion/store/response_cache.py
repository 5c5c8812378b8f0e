"""Answers kept for requests that ask the same again: exact matches only, in the trace database, for a limited time.

The key is a hash of all that an answer depends on: the client's API key, the conversation, the parameters, the members
with their configs and adapter revisions, the judge, the synthesizer, the mode's settings and the combiner. An answer is
kept only if nothing failed on the way to it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.contracts.database import Database
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.contracts.trace import Analysis, Citation, Debate, Trace, Verdict, Weighing
from mixfuse.fusion.answering.request import FusionRequest

logger = logging.getLogger(__name__)

# Reasons of answers that a healthy pool would not have given.
_DEGRADED = frozenset({"lone_survivor", "judge_failed", "synthesizer_failed"})
# Settings that change how an answer is sent, but not the answer.
_SENDING = {"expose", "include_reasoning", "keep_alive_ms", "cache", "cache_ttl_s"}
# An engine that is restarting is not waited for: the request then goes past the cache.
_PEEK_S = 0.5


class _Kept(Strict):
    """What is kept of an answer."""

    trace_id: str
    answer: str
    tool_calls: list[dict[str, Any]] | None
    thoughts: str | None
    finish_reason: str
    logprobs: dict[str, Any] | None
    winner: int | None
    reason: str
    verdicts: list[Verdict]
    debate: Debate | None
    citations: list[Citation] | None
    analysis: Analysis | None = None
    weighing: Weighing | None


class ResponseCache:
    """The kept answers.

    Args:
        database: Where they are.
        stores_whole: Whether texts may be stored as they are.
    """

    def __init__(self, database: Database, stores_whole: Callable[[Any], Awaitable[bool]]) -> None:
        self._database, self._stores_whole = database, stores_whole
        self._storing: set[asyncio.Task[None]] = set()

    async def answer(self, request: FusionRequest, work_out: Callable[[FusionRequest], Awaitable[str]]) -> str:
        """Answers a request from the cache, or works the answer out and keeps it.

        Raises:
            MixfuseError: As `work_out`. A database that does not answer costs nothing but the hit.
        """
        revisions = await self._revisions(request)
        if revisions is None:
            return await work_out(request)
        key = _key(request, revisions)
        if (kept := await self._get(key)) is not None:
            request.cached_from, request.reason, request.winner = kept.trace_id, kept.reason, kept.winner
            request.tool_calls, request.finish_reason = kept.tool_calls, kept.finish_reason
            request.thoughts = kept.thoughts
            if request.think is not None and kept.thoughts:
                await request.think(kept.thoughts)
            request.logprobs, request.verdicts, request.debate = kept.logprobs, kept.verdicts, kept.debate
            request.citations, request.weighing, request.analysis = kept.citations, kept.weighing, kept.analysis
            await request.emit_text(kept.answer)
            return kept.answer
        answer = await work_out(request)
        trace = request.trace(answer)
        if _may_keep(trace, revisions):
            kept = _Kept(
                trace_id=trace.id,
                answer=answer,
                tool_calls=trace.tool_calls,
                thoughts=request.thoughts,
                finish_reason=request.finish_reason,
                logprobs=request.logprobs,
                winner=trace.winner,
                reason=trace.reason,
                verdicts=trace.verdicts,
                debate=trace.debate,
                citations=trace.citations,
                analysis=trace.analysis,
                weighing=trace.weighing,
            )
            task = asyncio.create_task(self._put(key, kept, time.time() + request.plan.settings.cache_ttl_s))
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)
        return answer

    async def close(self) -> None:
        """Waits until the answers of the last requests are stored."""
        if self._storing:
            await asyncio.wait(self._storing)

    async def _revisions(self, request: FusionRequest) -> dict[str, str | None] | None:
        """Returns the adapter revision of each role that the request may ask; None if one is not served now."""
        plan = request.plan
        models = [*plan.members, *filter(None, (plan.judge, plan.synthesizer))]
        roles = {model.role for model in models if model.role is not None}
        try:
            async with asyncio.timeout(_PEEK_S):
                return {role: await request.pool.revision(role) for role in sorted(roles)}
        except Exception:
            logger.info("a role is not served now; the request goes past the cache", exc_info=True)
            return None

    async def _get(self, key: str) -> _Kept | None:
        query = text("SELECT record FROM response_cache WHERE key = :key AND expires_at > :now")

        def read(connection: Connection) -> str | None:
            found: str | None = connection.execute(query, {"key": key, "now": time.time()}).scalar()
            return found

        try:
            record = await self._database.run(read)
            return None if record is None else _Kept.model_validate_json(record)
        except (SQLAlchemyError, ValueError):
            logger.warning("a kept answer cannot be read; the request goes past the cache", exc_info=True)
            return None

    async def _put(self, key: str, kept: _Kept, expires_at: float) -> None:
        if not await self._stores_whole(
            kept.model_dump(include={"answer", "thoughts", "tool_calls", "debate", "weighing", "analysis"})
        ):
            return
        row = {"key": key, "expires_at": expires_at, "record": kept.model_dump_json(), "now": time.time()}

        def write(connection: Connection) -> None:
            connection.execute(text("DELETE FROM response_cache WHERE expires_at <= :now OR key = :key"), row)
            connection.execute(
                text("INSERT INTO response_cache (key, expires_at, record) VALUES (:key, :expires_at, :record)"), row
            )

        try:
            await self._database.run(write)
        except SQLAlchemyError:
            logger.warning("an answer could not be kept", exc_info=True)


def _may_keep(trace: Trace, revisions: dict[str, str | None]) -> bool:
    served = {None, *revisions.values()}
    return (
        trace.error is None
        and trace.reason not in _DEGRADED
        and not (trace.weighing is not None and trace.weighing.low_confidence)
        # A role that was swapped meanwhile answers under another key.
        and all(call.revision in served for call in trace.calls)
    )


def _key(request: FusionRequest, revisions: dict[str, str | None]) -> str:
    plan = request.plan
    return sha256_json(
        {
            "api_key": request.key,
            "model": plan.model,
            "mode": plan.mode,
            "messages": plan.messages,
            "parameters": plan.parameters,
            "members": [member.model_dump(mode="json") for member in plan.members],
            "judge": plan.judge and plan.judge.model_dump(mode="json"),
            "synthesizer": plan.synthesizer and plan.synthesizer.model_dump(mode="json"),
            "settings": plan.settings.model_dump(mode="json", exclude=_SENDING),
            "domain": plan.domain,
            "revisions": revisions,
            "combiner": getattr(request.combiner, "revision", None),
        }
    )
