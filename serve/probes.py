"""The probes of a freshly loaded adapter: does every engine apply it, and answer as when it was trained?

vLLM loads an adapter whose weights it does not recognise with "Success" and then answers exactly as the base does. An
adapter whose weights are not finite answers nonsense. Kernels have failed only in long prompts, only in batches, or
only in decoding. The probes detect all of it by log-probabilities (`contracts/agreement.py`).
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mixfuse.contracts import agreement
from mixfuse.contracts.adapter import Deviation, Effect, Measured, Probes, VerdictProbe, read_manifest, read_probes
from mixfuse.contracts.agreement import FIXED_PROMPTS, Answers, Rows
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import read_verdict
from mixfuse.serve.slots import AdapterEngine, ProbedEngine

Result = TypeVar("Result")

# An adapter that moves log-probabilities by no more than _TIMES_NOISE times what the base differs by from itself, plus
# what the number format makes of another batch, counts as ignored.
_TIMES_NOISE = 3.0
_AGAIN = 2  # times that the base answers the short probes once more, beside once in a batch with the adapter
_SHORT = 64  # tokens
_BATCH = 256  # tokens that are sent at once, unless one prompt is longer
_LENGTH = 1024  # of an engine that does not say how many tokens it takes
_DECODED = 8  # tokens that are written after a prompt
_SHARE = 0.1  # of a busy engine's time that probes take
_LOOK_S = 0.5  # between two looks at whether the engine is still busy
_MOST_PAUSED_S = 120.0  # by one engine's probes: a swap must end, and who asked for it waits
_MOST_KNOWN, _MOST_STARTS = 1024, 64  # prompts of which a base's answers are kept, adapters that passed, and engines


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

    @cached_property
    def once(self) -> list[int]:
        """The numbers of the prompts without those that are one text behind several beginnings."""
        return agreement.once(self.prompts) or [0]

    @cached_property
    def short(self) -> list[int]:
        """The numbers of the short prompts of `once`; of its shortest one, if none is short."""
        short = [number for number in self.once if len(self.prompts[number]) <= _SHORT]
        return short or [min(self.once, key=lambda number: len(self.prompts[number]))]

    @cached_property
    def batches(self) -> list[list[int]]:
        """The numbers of `once`, in groups that are sent at once."""
        return self._grouped(self.once)

    @cached_property
    def alone(self) -> list[list[int]]:
        """All numbers, each in a group of its own; only repeated texts are sent several at once, to save time."""
        rest = [number for number in range(len(self.prompts)) if number not in self.once]
        return [[number] for number in self.once] + self._grouped(rest)

    def shortened(self) -> "_Plan":
        """The same with its short prompts alone."""
        expected, verdicts = self.expected, self.verdicts
        if expected is not None:
            known = [number for number in self.short if number < len(expected.adapted)]
            expected = Answers(*([rows[number] for number in known] if rows else [] for rows in expected))
            base = [self.verdicts.base[number] for number in known] if self.verdicts.base else ()
            verdicts = replace(self.verdicts, base=base)
        prompts = [self.prompts[number] for number in self.short]
        expected = expected if expected and expected.adapted else None
        return replace(self, prompts=prompts, expected=expected, verdicts=verdicts)

    def _grouped(self, numbers: Sequence[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        tokens = 0
        for number in numbers:
            tokens += len(self.prompts[number])
            if not groups or tokens > _BATCH:
                groups.append([])
                tokens = len(self.prompts[number])
            groups[-1].append(number)
        return groups

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
    numbers = agreement.once([probe.tokens for probe in stored.logprobs])
    kept = [stored.logprobs[number] for number in numbers] or stored.logprobs
    return stored.model_copy(update={"logprobs": kept, "measured": {}})


def _cut(rows: Rows, prompts: list[list[int]]) -> list[list[float]]:
    return [list(row[: len(prompt) - 1]) for row, prompt in zip(rows, prompts, strict=True)]


class Prober:
    """Probes adapters in the engines of one server, and remembers what their bases said.

    While an engine works on requests, probes take a small share of its time (`_SHARE`). A swap then takes longer, and
    few requests meet a probe.
    """

    def __init__(self) -> None:
        self._starts: dict[str, _Start] = {}

    async def check(
        self, engine: AdapterEngine, model: str, directory: Path, terms: Terms, *, verdicts: bool, urgent: bool = False
    ) -> None:
        """Probes a loaded adapter in every engine and each of its data-parallel copies of the model.

        The prompts are those of its directory, or fixed ones without any.

        Args:
            engine: The engines that have it loaded.
            model: The adapter's name in them.
            directory: The adapter directory.
            terms: By what its answers are judged.
            verdicts: Whether to probe the stored verdicts too; the adapter is a judge.
            urgent: Whether requests may wait for the probes. If the adapter has passed all of them in each engine since
                its start, the short ones are enough then.

        Raises:
            MixfuseError: An engine ignores the adapter, or its answers are not finite, differ from those stored, or
                depend on what else is in the batch (kind "adapter"); or an engine does not answer (kind "engine").
        """
        stored = await asyncio.to_thread(read_probes, directory) or Probes(tolerance=0.0)
        effect = (await asyncio.to_thread(read_manifest, directory)).effect
        engines = [rank for one in engine.each() for rank in await one.ranks()]
        lengths = await _all([one.max_model_len() for one in engines])
        plan = _Plan.of(stored, terms, effect, min((known for known in lengths if known), default=_LENGTH))
        starts = [self._start_of(one) for one in engines]
        if urgent and all(model in start.passed for start in starts):
            plan = plan.shortened()
        said = []
        for one, start in zip(engines, starts, strict=True):
            pace = _Pace(one, start.costs, 0.0 if urgent else _MOST_PAUSED_S)
            said.append(await _Probed(one, model, directory, plan, pace=pace, of_base=start.base).check())
            if verdicts:
                checking = _check_verdicts(one, model, directory, plan, said[-1])
                await pace("verdicts", len(plan.verdicts.stored), checking)
        for other in said[1:]:
            if wrong := agreement.base_fault(said[0].base, other.base, allowed=plan.batch_tolerance):
                raise MixfuseError(wrong, kind="engine")
        for start in starts:
            start.passed.add(model)

    def _start_of(self, engine: ProbedEngine) -> "_Start":
        """What is known of an engine since it was started; nothing if its starts cannot be told apart."""
        if engine.started is None:
            return _Start()
        start = self._starts.pop(engine.started, None)
        if start is None or any(len(known) > _MOST_KNOWN for known in (start.base, start.passed, start.costs)):
            start = _Start()  # adapters bring their own prompts
        while len(self._starts) >= _MOST_STARTS:
            del self._starts[next(iter(self._starts))]
        self._starts[engine.started] = start
        return start


@dataclass(frozen=True)
class _Start:
    """What is known of an engine since it was started.

    Attributes:
        base: Prompt → log-probabilities of its base.
        passed: Adapters that have passed all probes, by their names, which have the revision.
        costs: Kind and tokens of a piece of work → the least time that it took, in seconds.
    """

    base: dict[tuple[int, ...], list[float]] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    costs: dict[tuple[str, int], float] = field(default_factory=dict)


class _Pace:
    """Leaves the time of a busy engine to its requests: after each piece of work, a pause of several times its length.

    A piece that waits for other requests takes longer than it costs them. So the least time counts that one of its kind
    and size has taken.

    Args:
        engine: The engine.
        costs: Those least times, in seconds.
        most: The most that all pauses take together, in seconds.
    """

    def __init__(self, engine: ProbedEngine, costs: dict[tuple[str, int], float], most: float) -> None:
        self._engine, self._costs, self._left = engine, costs, most

    async def __call__(self, what: str, tokens: int, work: Awaitable[Result]) -> Result:
        """The result of some work, after the pause. An engine without other work needs none.

        Args:
            what: The kind of work.
            tokens: Its size.
            work: The work.
        """
        began = time.monotonic()
        result = await work
        cost = self._costs[what, tokens] = min(time.monotonic() - began, self._costs.get((what, tokens), math.inf))
        pause = cost * (1 / _SHARE - 1)
        while pause > 0 and self._left > 0 and await self._engine.busy():
            slept = min(pause, self._left, _LOOK_S)
            await asyncio.sleep(slept)
            pause, self._left = pause - slept, self._left - slept
        return result


class _Probed:
    """An adapter in one engine."""

    def __init__(
        self,
        engine: ProbedEngine,
        model: str,
        directory: Path,
        plan: _Plan,
        *,
        pace: _Pace,
        of_base: dict[tuple[int, ...], list[float]],
    ) -> None:
        self._engine, self._model, self._directory, self._plan = engine, model, directory, plan
        self._base, self._pace, self._of_base = engine.base_model_name, pace, of_base

    async def check(self) -> Answers:
        """Checks the adapter; returns what the engine said."""
        plan = self._plan
        base = await self._base_alone()
        again = [await self._paced_read(self._base, plan.short) for _ in range(_AGAIN)]
        if not all(math.isfinite(value) for rows in (base, *again) for row in rows for value in row):
            raise MixfuseError("the engine's log-probabilities of its base are not finite", kind="engine")
        adapted, in_batch, base_in_batch, decoded = await self._with_adapter()
        short = [base[number] for number in plan.short]
        noise = [agreement.deviation(short, other) for other in (*again, base_in_batch)]
        for rows in (adapted, in_batch, *decoded):
            if not all(math.isfinite(value) for row in rows for value in row):
                raise self._refused(
                    "with it the engine's log-probabilities are not finite (NaN or infinite weights, or a kernel?)"
                )
        said = Answers(adapted, base)
        self._check_effect(said, noise)
        self._check_expected(said)
        alone = [adapted[number] for number in plan.once]
        for what, off in (
            ("in a batch with other requests than alone", agreement.deviation(alone, in_batch)),
            ("when it writes token by token than when it reads the same text", agreement.deviation(*decoded)),
        ):
            allowed = agreement.limits(plan.batch_tolerance, noise[-1])
            if any(value > most for value, most in zip(off.quantiles, allowed, strict=True)):
                raise self._refused(f"with it the engine answers otherwise {what}: log-probabilities are off by {off}")
        return said

    async def _base_alone(self) -> Rows:
        """The base's answers; the engine is asked for each once."""
        prompts, known = self._plan.prompts, self._of_base
        for numbers in self._plan.alone:
            if any(tuple(prompts[number]) not in known for number in numbers):
                rows = await self._paced_read(self._base, numbers)
                known.update({tuple(prompts[number]): row for number, row in zip(numbers, rows, strict=True)})
        return [known[tuple(prompt)] for prompt in prompts]

    async def _with_adapter(self) -> tuple[Rows, Rows, Rows, tuple[Rows, Rows]]:
        """Its answers alone and in batches, the base's in those batches, and of what it writes: written and read.

        In batches, it is asked for the prompts of `_Plan.once`, and the base for those of `_Plan.short`.
        """
        plan, prompts, engine = self._plan, self._plan.prompts, self._engine
        # What is written after the shortest prompt alone, and after the longest in the batch.
        by_length = sorted(plan.once, key=lambda number: len(prompts[number]))
        first, last = by_length[0], by_length[-1]
        in_batch: dict[int, list[float]] = {}
        base_in_batch: dict[int, list[float]] = {}
        written: dict[int, tuple[list[int], list[float]]] = {}
        alone: dict[int, list[float]] = {}
        try:
            await engine.probe(self._model)
            writing = engine.decode(self._model, prompts[first], _DECODED)
            single = await self._pace("write", len(prompts[first]), writing)
            for group in plan.batches:
                beside = [number for number in group if number in plan.short] or [first]
                writers = [number for number in group if number == last]
                said, said_by_base, wrote, _ = await self._pace(
                    "batch",
                    self._tokens(group),
                    asyncio.gather(
                        self._read(self._model, group),
                        self._read(self._base, beside),
                        self._write(self._model, writers),
                        self._write(self._base, [first for _ in writers]),
                    ),
                )
                in_batch.update(zip(group, said, strict=True))
                base_in_batch.update(zip(beside, said_by_base, strict=True))
                written.update(zip(writers, wrote, strict=True))
            read: list[list[float]] = []
            for number, (tokens, _) in ((first, single), (last, written[last])):  # one request says both
                text = [*prompts[number], *tokens]
                row = await self._pace("read", len(text), engine.prompt_logprobs(self._model, text))
                alone[number] = row[: -len(tokens)]
                read.append(row[-len(tokens) :])
            for numbers in plan.alone:
                if numbers not in ([first], [last]):
                    alone.update(zip(numbers, await self._paced_read(self._model, numbers), strict=True))
        except MixfuseError as error:
            await engine.probe(self._base)  # raises if the engine itself is gone
            # The engine is well, so the adapter is at fault: vLLM cannot send numbers that are not finite.
            raise self._refused(f"with it the engine does not answer ({error})") from None
        return (
            [alone[number] for number in range(len(prompts))],
            [in_batch[number] for number in plan.once],
            [base_in_batch[number] for number in plan.short],
            ([single[1], written[last][1]], read),
        )

    async def _paced_read(self, model: str, numbers: Sequence[int]) -> list[list[float]]:
        return await self._pace("read", self._tokens(numbers), self._read(model, numbers))

    def _tokens(self, numbers: Sequence[int]) -> int:
        return sum(len(self._plan.prompts[number]) for number in numbers)

    async def _read(self, model: str, numbers: Sequence[int]) -> list[list[float]]:
        """The log-probabilities of prompts, which are sent at once."""
        return await _all([self._engine.prompt_logprobs(model, self._plan.prompts[number]) for number in numbers])

    async def _write(self, model: str, numbers: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """What is written after prompts, which are sent at once."""
        return await _all([self._engine.decode(model, self._plan.prompts[number], _DECODED) for number in numbers])

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
