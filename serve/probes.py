"""The probes of a freshly loaded adapter: does the engine apply it, and does it answer as when it was trained?

vLLM loads an adapter whose weights it does not recognise with "Success" and then answers exactly as the base does. An
adapter whose weights are not finite answers nonsense. The probes detect both by log-probabilities.
"""

import asyncio
import math
from pathlib import Path

from mixfuse.contracts.adapter import LogprobProbe, Probes, VerdictProbe, read_probes
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import read_verdict
from mixfuse.serve.slots import AdapterEngine

# For adapters without probes of their own. The token ids are below 253, so every tokenizer has them.
_PROMPTS = [[3 + (7 * i * i + 31 * i + 11 * k) % 250 for i in range(24)] for k in range(3)]
# Two answers of the base differ by the engine's noise, since other requests share its batches. An adapter that moves no
# log-probability by more than _TIMES_NOISE times that noise plus _LEAST_EFFECT nats counts as ignored.
_TIMES_NOISE = 3.0
_LEAST_EFFECT = 1e-5
# The largest deviation of a judge's probability, however wide the tolerance in nats: beyond it the verdicts change.
_MOST_VERDICT_OFF = 0.1


async def check(engine: AdapterEngine, model: str, directory: Path, *, tolerance: float | None, verdicts: bool) -> None:
    """Probes a loaded adapter with the prompts stored in its directory, or with fixed ones if there are none.

    Args:
        engine: The engine that has it loaded.
        model: The adapter's name in the engine.
        directory: The adapter directory.
        tolerance: How far a log-probability may be from the stored one, in nats. None: the tolerance stored with the
            probes, which holds for a float32 engine.
        verdicts: Whether to probe the stored verdicts too; the adapter is a judge.

    Raises:
        MixfuseError: The engine ignores the adapter, or its answers are not finite or differ from those stored (kind
            "adapter"); or the engine does not answer (kind "engine").
    """
    stored = await asyncio.to_thread(read_probes, directory) or Probes(tolerance=0.0)
    limit = stored.tolerance if tolerance is None else tolerance
    prompts = [probe.tokens for probe in stored.logprobs] or _PROMPTS
    base = await _logprobs(engine, engine.base_model_name, prompts)
    base_again = await _logprobs(engine, engine.base_model_name, prompts)
    try:
        await engine.probe(model)
        measured = await _logprobs(engine, model, prompts)
    except MixfuseError as error:
        await engine.probe(engine.base_model_name)  # raises if the engine itself is gone
        # The engine is well, so the adapter is at fault: vLLM cannot send numbers that are not finite.
        raise _refused(directory, f"with it the engine does not answer ({error})") from None
    if not all(math.isfinite(value) for row in measured for value in row):
        raise _refused(directory, "with it the engine's log-probabilities are not finite (NaN or infinite weights?)")
    if _distance(measured, base) <= _TIMES_NOISE * _distance(base_again, base) + _LEAST_EFFECT:
        raise _refused(directory, "with it the engine answers exactly as the base does; it ignores the adapter")
    _check_logprobs(directory, stored.logprobs, measured, limit)
    if verdicts:
        await _check_verdicts(engine, model, directory, stored.verdicts, min(limit, _MOST_VERDICT_OFF))


async def _logprobs(engine: AdapterEngine, model: str, prompts: list[list[int]]) -> list[list[float]]:
    return list(await asyncio.gather(*(engine.prompt_logprobs(model, prompt) for prompt in prompts)))


def _check_logprobs(directory: Path, stored: list[LogprobProbe], measured: list[list[float]], limit: float) -> None:
    if not stored:
        return
    off = _distance(measured, [probe.logprobs for probe in stored])
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
            verdict = "cannot be read" if p is None else f"is {p:.3f}"
            raise _refused(
                directory, f"its verdict on stored comparison {number} {verdict}; it was {probe.p:.3f} when it was made"
            )


def _distance(left: list[list[float]], right: list[list[float]]) -> float:
    """The largest absolute difference of two sets of log-probabilities, in nats."""
    return max(abs(a - b) for rows in zip(left, right, strict=True) for a, b in zip(*rows, strict=True))


def _refused(directory: Path, what: str) -> MixfuseError:
    return MixfuseError(f"{directory}: {what}", kind="adapter")
