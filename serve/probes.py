"""The probes of a freshly loaded adapter: does every engine apply it, and answer as when it was trained?

vLLM loads an adapter whose weights it does not recognise with "Success" and then answers exactly as the base does. An
adapter whose weights are not finite answers nonsense. Kernels have failed only in long prompts, only in batches, or
only in decoding. The probes detect all of it by log-probabilities (`contracts/agreement.py`).
"""

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mixfuse.contracts import agreement
from mixfuse.contracts.adapter import Deviation, Effect, Measured, Probes, VerdictProbe, read_manifest, read_probes
from mixfuse.contracts.agreement import FIXED_PROMPTS, Answers, Rows, repeats
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import read_verdict
from mixfuse.serve.slots import AdapterEngine, ProbedEngine

Result = TypeVar("Result")

# An adapter that moves log-probabilities by no more than _TIMES_NOISE times what the base differs by from itself, plus
# what the number format makes of another batch, counts as ignored.
_TIMES_NOISE = 3.0
_AGAIN = 2  # times that the base answers the short probes once more, beside once in a batch with the adapter
_SHORT = 64  # tokens
_LENGTH = 1024  # of an engine that does not say how many tokens it takes
_DECODED = 8  # tokens that are written after a prompt


@dataclass(frozen=True)
class Terms:
    """By what an adapter's answers are judged.

    Attributes:
        tolerance: The deviation of a log-probability that is always allowed, in nats. None: the stored one in a float32
            engine, and what the number format makes in others.
        precision: The engine's number format, with its quantisation.
    """

    tolerance: float | None = None
    precision: str = "float32"


async def check(engine: AdapterEngine, model: str, directory: Path, terms: Terms, *, verdicts: bool) -> None:
    """Probes a loaded adapter in every engine, with the prompts of its directory, or with fixed ones without any.

    Args:
        engine: The engines that have it loaded.
        model: The adapter's name in them.
        directory: The adapter directory.
        terms: By what its answers are judged.
        verdicts: Whether to probe the stored verdicts too; the adapter is a judge.

    Raises:
        MixfuseError: An engine ignores the adapter, or its answers are not finite, differ from those stored, or depend
            on what else is in the batch (kind "adapter"); or an engine does not answer (kind "engine").
    """
    stored = await asyncio.to_thread(read_probes, directory) or Probes(tolerance=0.0)
    effect = (await asyncio.to_thread(read_manifest, directory)).effect
    engines = engine.each()
    lengths = await _all([one.max_model_len() for one in engines])
    plan = _Plan.of(stored, terms, effect, min((known for known in lengths if known), default=_LENGTH))
    said = []
    for one in engines:
        said.append(await _Probed(one, model, directory, plan).check())
        if verdicts:
            await _check_verdicts(one, model, directory, plan, said[-1])
    for other in said[1:]:
        if wrong := agreement.base_fault(said[0].base, other.base, allowed=plan.batch_tolerance):
            raise MixfuseError(wrong, kind="engine")


async def ask_verdicts(engine: ProbedEngine, model: str, stored: Sequence[VerdictProbe]) -> list[float | None]:
    """A judge's verdicts on stored comparisons, as an engine says them; None for one that cannot be read.

    Args:
        engine: The engine that has the judge loaded.
        model: The judge's name in it.
        stored: The comparisons.

    Raises:
        MixfuseError: The engine does not answer.
    """
    answers = await _all([engine.first_token_logprobs(model, probe.messages) for probe in stored])
    return [read_verdict(answer) for answer in answers]


@dataclass(frozen=True)
class _Verdicts:
    """What a judge should say.

    Attributes:
        stored: The comparisons with its verdicts.
        base: What the base said where they were given; empty if it is not known.
        tolerance: What a log-probability there may always be off by, in nats.
        when: When they were given.
    """

    stored: Sequence[VerdictProbe]
    base: Rows
    tolerance: float
    when: str = "when it was made"

    def measured(self, said: Measured, base: Rows, precision: str, tolerance: float) -> "_Verdicts":
        """Those that an engine of the same number format gave: only another batch moves them."""
        pairs = zip(self.stored, said.verdicts, strict=True)
        return _Verdicts(
            [probe.model_copy(update={"p": p}) for probe, p in pairs],
            base,
            agreement.batch_tolerance(precision, tolerance),
            f"when it was verified in {precision}",
        )


@dataclass(frozen=True)
class _Plan:
    """What is sent to each engine, and what it should say.

    Attributes:
        prompts: Token ids: those that are stored, then longer ones, as far as the engine takes them.
        expected: What a right engine says of those that are stored; None if there are none.
        effect: The median effect on `FIXED_PROMPTS`, if only that is known.
        tolerance: The deviation that is always allowed, in nats.
        precision: The engines' number format.
        verdicts: A judge's comparisons, with what a right engine says.
    """

    prompts: list[list[int]]
    expected: Answers | None
    effect: Effect | None
    tolerance: float
    precision: str
    verdicts: _Verdicts

    @classmethod
    def of(cls, stored: Probes, terms: Terms, effect: Effect | None, length: int) -> "_Plan":
        longest = max(2, length - _DECODED - 1)
        if not stored.logprobs:
            verdicts = _Verdicts(stored.verdicts, (), 0.0)
            return cls(agreement.fixed_prompts(longest), None, effect, 0.0, terms.precision, verdicts)
        if terms.precision == "float32":  # rounds too little to need them
            stored = _without_repeats(stored)
        prompts = [probe.tokens[:longest] for probe in stored.logprobs]
        measured = stored.measured.get(terms.precision)
        if measured is not None:
            known = [len(row) + 1 for row in measured.logprobs]
            prompts = [prompt[:size] for prompt, size in zip(prompts, known, strict=True)]
        probes = stored.logprobs
        columns: list[Rows] = [[probe.logprobs for probe in probes], [probe.base for probe in probes], []]
        columns[2] = [probe.no_experts for probe in probes]
        reference_base = _cut(columns[1], prompts) if all(columns[1]) else []
        if measured is not None:
            columns = [measured.logprobs, measured.base, []]
        cut = [_cut(rows, prompts) if rows and all(rows) else [] for rows in columns]
        tolerance = terms.tolerance
        if tolerance is None:
            tolerance = agreement.tolerance_in(terms.precision, stored.tolerance, base_known=bool(cut[1]))
            if stored.precision != "float32" and measured is None:  # a run's own, in the training's type
                tolerance = max(tolerance, agreement.LOW_TOLERANCE)
        longer = [prompt for prompt in agreement.fixed_prompts(longest) if len(prompt) > max(map(len, prompts))]
        verdicts = _Verdicts(stored.verdicts, reference_base, tolerance)
        if measured is not None and measured.verdicts:
            verdicts = verdicts.measured(measured, cut[1], terms.precision, tolerance)
        return cls(prompts + longer, Answers(*cut), effect, tolerance, terms.precision, verdicts)

    def known(self, said: Answers) -> Answers:
        """An engine's answers to the prompts of which it is known what a right one says."""
        count = len(self.expected.adapted) if self.expected is not None else 0
        return Answers(said.adapted[:count], said.base[:count])

    @property
    def batch_tolerance(self) -> float:
        """What an answer may differ by in another batch, in nats."""
        return agreement.batch_tolerance(self.precision, self.tolerance)

    def verdict_limit(self, said: Answers) -> float:
        """What a judge's probability may be off by."""
        base = self.verdicts.base
        drift = agreement.deviation(base, self.known(said).base) if base else None
        return agreement.verdict_limit(self.verdicts.tolerance, drift)


def _without_repeats(stored: Probes) -> Probes:
    """The probes without the texts that are asked behind several beginnings."""
    repeated = {number for numbers in repeats([probe.tokens for probe in stored.logprobs]) for number in numbers}
    kept = [probe for number, probe in enumerate(stored.logprobs) if number not in repeated]
    return stored.model_copy(update={"logprobs": kept, "measured": {}})


def _cut(rows: Rows, prompts: list[list[int]]) -> list[list[float]]:
    return [list(row[: len(prompt) - 1]) for row, prompt in zip(rows, prompts, strict=True)]


class _Probed:
    """An adapter in one engine."""

    def __init__(self, engine: ProbedEngine, model: str, directory: Path, plan: _Plan) -> None:
        self._engine, self._model, self._directory, self._plan = engine, model, directory, plan
        self._base = engine.base_model_name

    async def check(self) -> Answers:
        """Checks the adapter; returns what the engine said."""
        prompts = self._plan.prompts
        base = [await self._engine.prompt_logprobs(self._base, prompt) for prompt in prompts]
        short = [number for number, prompt in enumerate(prompts) if len(prompt) <= _SHORT]
        again = [await self._logprobs(self._base, [prompts[number] for number in short]) for _ in range(_AGAIN)]
        if not all(math.isfinite(value) for rows in (base, *again) for row in rows for value in row):
            raise MixfuseError("the engine's log-probabilities of its base are not finite", kind="engine")
        adapted, in_batch, base_in_batch, decoded = await self._with_adapter()
        noise = [agreement.deviation([base[number] for number in short], other) for other in again if short]
        noise.append(agreement.deviation(base, base_in_batch))
        for rows in (adapted, in_batch, *decoded):
            if not all(math.isfinite(value) for row in rows for value in row):
                raise self._refused(
                    "with it the engine's log-probabilities are not finite (NaN or infinite weights, or a kernel?)"
                )
        said = Answers(adapted, base)
        self._check_effect(said, noise)
        self._check_expected(said)
        for what, off in (
            ("in a batch with other requests than alone", agreement.deviation(adapted, in_batch)),
            ("when it writes token by token than when it reads the same text", agreement.deviation(*decoded)),
        ):
            allowed = agreement.limits(self._plan.batch_tolerance, noise[-1])
            if any(value > most for value, most in zip(off.quantiles, allowed, strict=True)):
                raise self._refused(f"with it the engine answers otherwise {what}: log-probabilities are off by {off}")
        return said

    async def _with_adapter(self) -> tuple[Rows, Rows, Rows, tuple[Rows, Rows]]:
        """Its answers alone and in a batch, the base's in that batch, and of what it writes: written and read."""
        prompts, engine = self._plan.prompts, self._engine
        try:
            await engine.probe(self._model)
            # What is written after the shortest prompt alone, and after the longest in the batch.
            by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
            first, last = by_length[0], by_length[-1]
            single = await engine.decode(self._model, prompts[first], _DECODED)
            work: list[Awaitable[Any]] = [
                self._logprobs(self._model, prompts),
                self._logprobs(self._base, prompts),
                engine.decode(self._model, prompts[last], _DECODED),
                engine.decode(self._base, prompts[first], _DECODED),
            ]
            in_batch, base_in_batch, batched, _ = await _all(work)
            alone: dict[int, list[float]] = {}
            read: list[list[float]] = []
            for number, (tokens, _) in ((first, single), (last, batched)):  # one request says both
                row = await engine.prompt_logprobs(self._model, [*prompts[number], *tokens])
                alone[number] = row[: -len(tokens)]
                read.append(row[-len(tokens) :])
            for number in by_length[1:-1]:
                alone[number] = await engine.prompt_logprobs(self._model, prompts[number])
        except MixfuseError as error:
            await engine.probe(self._base)  # raises if the engine itself is gone
            # The engine is well, so the adapter is at fault: vLLM cannot send numbers that are not finite.
            raise self._refused(f"with it the engine does not answer ({error})") from None
        rows = [alone[number] for number in range(len(prompts))]
        return rows, in_batch, base_in_batch, ([single[1], batched[1]], read)

    async def _logprobs(self, model: str, prompts: list[list[int]]) -> Rows:
        """The log-probabilities of prompts, in one batch."""
        return await _all([self._engine.prompt_logprobs(model, prompt) for prompt in prompts])

    def _check_effect(self, said: Answers, noise: Sequence[Deviation]) -> None:
        effect = agreement.deviation(said.adapted, said.base)
        least = agreement.noise_floor(self._plan.precision)
        if effect.p90 <= _TIMES_NOISE * max(one.p90 for one in noise) + least:
            raise self._refused("with it the engine answers exactly as the base does; it ignores the adapter")
        if self._plan.expected is None and self._plan.effect is not None:
            count = len([prompt for prompt in self._plan.prompts if prompt in FIXED_PROMPTS])
            shown = agreement.deviation(said.adapted[:count], said.base[:count]) if count else None
            if shown and (wrong := agreement.size_fault(self._plan.effect.median, shown.median)):
                raise self._refused(wrong)

    def _check_expected(self, said: Answers) -> None:
        expected = self._plan.expected
        if expected is None:
            return
        found = agreement.compare(expected, self._plan.known(said), self._plan.prompts)
        wrong = agreement.fault(found, tolerance=self._plan.tolerance)
        if wrong:
            raise self._refused(
                f"in this engine ({self._plan.precision}) {wrong}; check it with `mixfuse adapter verify DIR --config "
                "SERVE.YAML`, or allow more by probe_tolerance in the serve config"
            )

    def _refused(self, what: str) -> MixfuseError:
        return MixfuseError(f"{self._directory}: {what}", kind="adapter")


async def _check_verdicts(engine: ProbedEngine, model: str, directory: Path, plan: _Plan, said: Answers) -> None:
    expected = plan.verdicts
    answers = await ask_verdicts(engine, model, expected.stored)
    known = [probe.p for probe in expected.stored]
    wrong = agreement.verdict_fault(answers, known, limit=plan.verdict_limit(said), when=expected.when)
    if wrong:
        raise MixfuseError(f"{directory}: {wrong}", kind="adapter")


async def _all(calls: Sequence[Awaitable[Result]]) -> list[Result]:
    """The results of calls that are made at once."""
    return list(await asyncio.gather(*calls))
