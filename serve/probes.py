"""What a freshly loaded adapter is asked before it serves: whether the engine really applies it, and as it was trained.

vLLM loads an adapter whose weights it does not recognise with "Success" and then answers exactly as the base does; one
whose weights are not finite answers nonsense. Both are found here, by log-probabilities.
"""

import asyncio
import math
from pathlib import Path

from mixfuse.contracts.adapter import LogprobProbe, Probes, VerdictProbe, read_probes
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import read_verdict
from mixfuse.serve.slots import AdapterEngine

# Token ids that every Mixtral tokenizer has; for adapters that bring no probes of their own.
_PROMPTS = [[3 + (7 * i * i + 31 * i + 11 * k) % 250 for i in range(24)] for k in range(3)]
# The base asked twice says how much the engine differs from itself (other requests share its batches); an adapter that
# moves nothing by more than so many times that, and this many nats, is ignored.
_TIMES_NOISE = 3.0
_LEAST_EFFECT = 1e-5
# However wide the tolerance in nats: a judge whose probability is off by more judges otherwise.
_MOST_VERDICT_OFF = 0.1


async def check(engine: AdapterEngine, model: str, directory: Path, *, tolerance: float | None, verdicts: bool) -> None:
    """Asks a loaded adapter its stored probes, or fixed prompts where it has none.

    Args:
        engine: Has it loaded.
        model: Its name there.
        directory: The adapter directory.
        tolerance: How far a stored log-probability may be off, in nats; None: as the probes say, which is for float32.
        verdicts: Whether it is a judge, whose stored verdicts are asked too.

    Raises:
        MixfuseError: The engine ignores it, or its answers are not finite or not those stored (`kind` "adapter"); or
            the engine does not answer (`kind` "engine").
    """
    stored = await asyncio.to_thread(read_probes, directory) or Probes(tolerance=0.0)
    limit = stored.tolerance if tolerance is None else tolerance
    prompts = [probe.tokens for probe in stored.logprobs] or _PROMPTS
    base = await _ask(engine, engine.base_model_name, prompts)
    again = await _ask(engine, engine.base_model_name, prompts)
    try:
        await engine.probe(model)
        fresh = await _ask(engine, model, prompts)
    except MixfuseError as error:
        await engine.probe(engine.base_model_name)  # raises where it is the engine that is gone
        # It is the adapter: vLLM cannot send numbers that are not finite.
        raise _refused(directory, f"with it the engine does not answer ({error})") from None
    if not all(math.isfinite(value) for row in fresh for value in row):
        raise _refused(directory, "with it the engine's log-probabilities are not finite (NaN or infinite weights?)")
    if _distance(fresh, base) <= _TIMES_NOISE * _distance(again, base) + _LEAST_EFFECT:
        raise _refused(directory, "with it the engine answers exactly as the base does; it ignores the adapter")
    _check_logprobs(directory, stored.logprobs, fresh, limit)
    if verdicts:
        await _check_verdicts(engine, model, directory, stored.verdicts, min(limit, _MOST_VERDICT_OFF))


async def _ask(engine: AdapterEngine, model: str, prompts: list[list[int]]) -> list[list[float]]:
    return list(await asyncio.gather(*(engine.prompt_logprobs(model, prompt) for prompt in prompts)))


def _check_logprobs(directory: Path, stored: list[LogprobProbe], fresh: list[list[float]], limit: float) -> None:
    if not stored:
        return
    off = _distance(fresh, [probe.logprobs for probe in stored])
    if off > limit:
        raise _refused(
            directory,
            f"in this engine its log-probabilities are off by {off:.2g} nats from those stored with it, {limit:.2g} "
            "are allowed; check it with `mixfuse adapter verify DIR --base BASE`, or allow more by probe_tolerance in "
            "the serve config where the engine is less precise",
        )


async def _check_verdicts(
    engine: AdapterEngine, model: str, directory: Path, stored: list[VerdictProbe], limit: float
) -> None:
    answers = await asyncio.gather(*(engine.first_token_logprobs(model, probe.messages) for probe in stored))
    for number, (probe, answer) in enumerate(zip(stored, answers, strict=True), start=1):
        p = read_verdict(answer)
        if p is None or not abs(p - probe.p) <= limit:
            found = "cannot be read" if p is None else f"is {p:.3f}"
            raise _refused(
                directory, f"its verdict on stored comparison {number} {found}; it was {probe.p:.3f} when it was made"
            )


def _distance(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for row, wanted in zip(one, other, strict=True) for a, b in zip(row, wanted, strict=True))


def _refused(directory: Path, what: str) -> MixfuseError:
    return MixfuseError(f"{directory}: {what}", kind="adapter")
