"""Whether two sets of log-probabilities agree, as far as the number format that an engine computes in lets one tell.

The largest difference over all tokens grows with their number, and an unlikely token is far off in any low precision.
So differences are summed up as quantiles, and they may be as large as what the base model itself moves by in the same
engine. A format that is coarse enough hides a wrong adapter in that; the *share* shows it: how much of the adapter's
known effect the engine shows, token by token. An adapter that is ignored has 0, one that is applied twice 2.

Another revision of the same adapter has a share near 1 as well, and its difference drowns in the rounding of single
tokens. Rounding differs where a text has another beginning; the difference of two adapters hardly does. So some texts
are asked behind several beginnings. The mean over them shows the *rest*, which is systematically not the known effect,
and their spread shows what rounding alone makes of such a mean.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from mixfuse.contracts.adapter import Deviation, Effect, LogprobProbe, Rest, Share
from mixfuse.contracts.errors import MixfuseError

Rows = Sequence[Sequence[float]]
"""The log-probabilities, in nats, of the tokens of several prompts."""
Array = NDArray[Any]

FIXED_PROMPTS = [[3 + (7 * i * i + 31 * i + 11 * k) % 250 for i in range(24)] for k in range(3)]
"""Token ids for adapters without probes of their own; they are below 253, so every tokenizer has them."""
LENGTHS = (16, 512, 4096)
"""Tokens of the probes that are there for their length: kernels have failed only beyond some hundred tokens."""
REPEATED = 24
"""Tokens of the texts that are asked behind several beginnings."""
LOW_TOLERANCE = 0.02
"""Nats: what is always allowed below float32, where the base's own drift comes on top."""
UNKNOWN_TOLERANCE = 0.5
"""Nats: the same where that drift is not known. An unlikely token is easily a few tenths off in bfloat16."""
_QUANTILES = (0.5, 0.9, 0.99)
# A right adapter moves as the base does, a little more where both the base's and the adapter's products are rounded.
_TIMES_BASE = 2.0
_BATCH_TOLERANCE = {"float32": 1e-3}
_LOW_BATCH_TOLERANCE = 0.1  # nats, below float32, where another batch takes another kernel
_TIMES_BATCH = 3  # how far the base's median may be off in another engine
# The share of the effect, and of its size, that an engine shows of an adapter that it applies as it is.
_LEAST_SHARE, _MOST_SHARE = 0.7, 1.4
# The rest that a right adapter may show: where the base is not off, and for each nat that it is systematically off by.
# A format rounds the weights, and an adapter on other weights has another effect; a router that rounding tips sends a
# token to another expert, whatever it stands behind.
_LEAST_REST, _REST_PER_NAT = 0.15, 1.0
_FEWEST = 4  # beginnings of a text, or texts, whose spread says anything
_PRIOR = 4  # beginnings that the usual spread counts for, beside that of a token
_BLOCKS = 12  # of tokens, whose shares show how sure the share is
_ROUNDS = 30
_NOTHING = 1e-4  # nats


class Answers(NamedTuple):
    """What one computation says of the probes.

    Attributes:
        adapted: Log-probabilities under the adapter.
        base: Of the base alone; empty if they are not known.
        no_experts: Under the adapter without its experts; empty if it trains none, or they are not known.
    """

    adapted: Rows
    base: Rows = ()
    no_experts: Rows = ()


def deviation(left: Rows, right: Rows) -> Deviation:
    """Sums up how far two sets are apart.

    Raises:
        MixfuseError: They are of other tokens, or one holds NaN or infinity (kind "parity").
    """
    if [len(row) for row in left] != [len(row) for row in right]:
        raise MixfuseError("the engine returned another number of tokens than were sent", kind="parity")
    apart = numpy.abs(_flat(left) - _flat(right))
    if not apart.size:
        raise MixfuseError("there is no token to compare", kind="parity")
    if not numpy.isfinite(apart).all():
        raise MixfuseError("log-probabilities are no numbers, as from an overflow", kind="parity")
    place = int(apart.argmax())
    prompt = 0
    while place >= len(left[prompt]):
        place -= len(left[prompt])
        prompt += 1
    middle, p90, p99 = (float(value) for value in numpy.quantile(apart, _QUANTILES))
    # The first token of a prompt has no log-probability.
    return Deviation(median=middle, p90=p90, p99=p99, worst=float(apart.max()), prompt=prompt, position=place + 1)


def limits(tolerance: float, drift: Deviation | None) -> tuple[float, float, float]:
    """The largest median, 90 % and 99 % quantile of a right adapter's deviation, in nats.

    Args:
        tolerance: What is always allowed.
        drift: How far the base itself is from what it said where the expected answers were computed.
    """
    moved = drift.quantiles if drift is not None else (0.0, 0.0, 0.0)
    middle, p90, p99 = (max(tolerance, _TIMES_BASE * value) for value in moved)
    return middle, p90, p99


def wrong(share: Share) -> bool:
    """Whether it is not what an engine shows that applies the part as it is."""
    slack = 3 * share.error
    return not _LEAST_SHARE - slack <= share.value <= _MOST_SHARE + slack


def unsure(share: Share) -> bool:
    """Whether an engine that ignored the part would pass."""
    return not 3 * share.error < _LEAST_SHARE


def shares(expected: Answers, measured: Answers) -> list[Share]:
    """The share of each part of the expected effect that is in the measured one: least absolute deviations.

    The base is taken off on both sides, so what a number format does to the base is not taken for the adapter's. A few
    tokens that are far off do not move the result.
    """
    base, adapted = _flat(expected.base), _flat(expected.adapted)
    shown = _flat(measured.adapted) - _flat(measured.base)
    if expected.no_experts:
        rest = _flat(expected.no_experts)
        names = ["the adapter without its experts", "its experts"]
        parts = numpy.stack([rest - base, adapted - rest], axis=1)
    else:
        names, parts = ["the adapter"], (adapted - base)[:, None]
    there = numpy.abs(parts).max(axis=0) > _NOTHING  # an adapter of experts alone has no other part
    names, parts = [name for name, is_there in zip(names, there, strict=True) if is_there], parts[:, there]
    if not names:
        return []
    values = _fitted(parts, shown)
    blocks = numpy.array([_fitted(parts[start::_BLOCKS], shown[start::_BLOCKS]) for start in range(_BLOCKS)])
    errors = blocks.std(axis=0) / math.sqrt(_BLOCKS)
    return [
        Share(part=part, value=value, error=error)
        for part, value, error in zip(names, values.tolist(), errors.tolist(), strict=True)
    ]


def _fitted(parts: Array, shown: Array) -> Array:
    """The factors of the parts whose sum has the least absolute deviation, by reweighted least squares."""
    weights = numpy.ones(len(shown))
    factors = numpy.zeros(parts.shape[1])
    for _ in range(_ROUNDS):
        root = numpy.sqrt(weights)
        factors = numpy.linalg.lstsq(parts * root[:, None], shown * root, rcond=None)[0]
        weights = 1 / numpy.maximum(numpy.abs(shown - parts @ factors), _NOTHING)
    return factors


def repeats(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the prompts that end in the same text behind several beginnings, for each such text."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        if len(prompt) > REPEATED:
            found.setdefault((len(prompt), *prompt[-REPEATED:]), []).append(number)
    return [numbers for numbers in found.values() if len(numbers) >= _FEWEST]


def once(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the prompts that are not one text behind several beginnings."""
    repeated = {number for numbers in repeats(prompts) for number in numbers}
    return [number for number in range(len(prompts)) if number not in repeated]


def rest(expected: Answers, measured: Answers, prompts: Sequence[Sequence[int]]) -> Rest | None:
    """What an engine shows of an adapter's effect that is no multiple of the known one.

    Returns:
        None if too few texts have several beginnings, or what the base says is not known.
    """
    texts = repeats(prompts) if expected.base and measured.base else []
    if len(texts) < _FEWEST:
        return None
    fewest = min(map(len, texts))

    def tails(rows: Rows) -> Array:  # (texts, beginnings, tokens)
        return numpy.array([[rows[number][-REPEATED:] for number in numbers[:fewest]] for numbers in texts])

    base, known = tails(expected.base), tails(expected.adapted) - tails(expected.base)
    drift, shown = tails(measured.base) - base, tails(measured.adapted) - tails(measured.base)
    middle = known.mean(1)
    factor = (shown.mean(1) * middle).sum() / max((middle * middle).sum(), _NOTHING**2)
    other = shown - factor * known
    spread = other.var(1, ddof=1)
    steadied = (_PRIOR * spread.mean() + (fewest - 1) * spread) / (_PRIOR + fewest - 1)
    weights = 1 / (steadied + _NOTHING**2)  # a token that rounding moves much says little
    by_text = [(weights * _systematic(values)).sum(1) for values in (other, known, drift)]
    square, effect, moved = (float(sums.sum()) for sums in by_text)
    if effect <= 0:
        return None
    # The share of the rest, with one text after the other left out.
    without = (square - by_text[0]) / numpy.maximum(effect - by_text[1], _NOTHING**2)
    error = float(without.std()) * math.sqrt(len(texts) - 1)
    return Rest(square=square / effect, error=error, drift=math.sqrt(max(0.0, moved) / float(weights.sum())))


def _systematic(values: Array) -> Array:
    """The square of each token's mean over the beginnings, less what their spread makes of it: (texts, tokens)."""
    squares: Array = values.mean(1) ** 2 - values.var(1, ddof=1) / values.shape[1]
    return squares


def most_rest(found: Rest) -> float:
    """The largest rest of a right adapter, as a share of the effect."""
    return _LEAST_REST + _REST_PER_NAT * found.drift


class Comparison(NamedTuple):
    """How an engine's answers compare with the expected ones.

    Attributes:
        off: How far those under the adapter are apart.
        drift: How far those of the base are; None if they are not known.
        shares: How much of the adapter's effect the engine shows, by part.
        rest: What it shows beside that; None if the probes cannot tell.
    """

    off: Deviation
    drift: Deviation | None = None
    shares: Sequence[Share] = ()
    rest: Rest | None = None


def fault(found: Comparison, *, tolerance: float) -> str | None:
    """What is wrong with an engine's answers under an adapter; None if nothing is.

    Args:
        found: How they compare with those of a right engine.
        tolerance: The deviation that is always allowed, in nats.
    """
    off, drift = found.off, found.drift
    names = ("median", "90 % quantile", "99 % quantile")
    for name, value, most in zip(names, off.quantiles, limits(tolerance, drift), strict=True):
        if value > most:
            base = f"; the base itself is off by {drift}" if drift is not None else ""
            return f"its log-probabilities are off by {off}; {most:.2g} is allowed for the {name}{base}"
    if share := next((share for share in found.shares if wrong(share)), None):
        return f"it shows {share}, where 1 is right (0: it ignores it, 2: it applies it twice)"
    if found.rest is not None and found.rest.square - 3 * found.rest.error > most_rest(found.rest) ** 2:
        return (
            f"its effect is another than the adapter's by {found.rest}; {most_rest(found.rest):.0%} are allowed; is it "
            "another revision?"
        )
    return None


def compare(expected: Answers, measured: Answers, prompts: Sequence[Sequence[int]] = ()) -> Comparison:
    """Compares an engine's answers with the expected ones; without the base's, only those under the adapter.

    Args:
        expected: What a right engine says.
        measured: What the engine says.
        prompts: The prompts' token ids; those that `repeats` finds show the rest.

    Raises:
        MixfuseError: As for `deviation`.
    """
    off = deviation(expected.adapted, measured.adapted)
    if not expected.base:
        return Comparison(off)
    drift = deviation(expected.base, measured.base)
    return Comparison(off, drift, shares(expected, measured), rest(expected, measured, prompts))


def tolerance_in(precision: str, stored: float, *, base_known: bool) -> float:
    """The deviation that is always allowed in an engine, in nats.

    Args:
        precision: Its number format.
        stored: The tolerance for float32.
        base_known: Whether the base's expected answers are known, so that its drift is added.
    """
    if precision == "float32":
        return stored
    return LOW_TOLERANCE if base_known else UNKNOWN_TOLERANCE


def batch_tolerance(precision: str, tolerance: float) -> float:
    """What an engine's answer may differ by in another batch, and so from another engine's of the same format, in nats.

    Args:
        precision: The number format.
        tolerance: The deviation that is always allowed, in nats.
    """
    return max(tolerance, _BATCH_TOLERANCE.get(precision, _LOW_BATCH_TOLERANCE))


def base_fault(first: Rows, other: Rows, *, allowed: float) -> str | None:
    """What tells that two engines serve different bases: their median, whatever one token does; None if nothing does.

    Args:
        first: What the base says in one of them.
        other: In the other.
        allowed: What an answer may differ by in another batch, in nats.

    Raises:
        MixfuseError: As for `deviation`.
    """
    apart = deviation(first, other)
    if apart.median <= _TIMES_BATCH * allowed:
        return None
    return f"the base is not the same in all engines: log-probabilities are {apart} apart; do all serve the same base?"


def verdict_limit(tolerance: float, drift: Deviation | None) -> float:
    """What a judge's probability may be off by: two tokens' log-probabilities move it by half their deviation.

    Args:
        tolerance: The deviation of a log-probability that is always allowed, in nats.
        drift: How far the base itself is from what it said where the expected verdicts were given.
    """
    return limits(tolerance, drift)[2] / 2


def verdict_fault(said: Sequence[float | None], expected: Sequence[float], *, limit: float, when: str) -> str | None:
    """What is wrong with a judge's verdicts; None if nothing is.

    Args:
        said: Its probabilities; None where neither verdict was among the likeliest tokens.
        expected: Those of a right engine.
        limit: How far one may be off.
        when: When those were given.
    """
    for number, (p, known) in enumerate(zip(said, expected, strict=True), start=1):
        if p is None or not abs(p - known) <= limit:
            verdict = "cannot be read" if p is None else f"is {p:.3f}"
            return (
                f"its verdict on stored comparison {number} {verdict}; it was {known:.3f} {when}, and {limit:.2g} is "
                "allowed"
            )
    return None


def noise_floor(precision: str) -> float:
    """The least that a number format makes two answers differ by in different batches, in nats."""
    return 1e-5 if precision == "float32" else 5e-3


def size_fault(expected: float, measured: float) -> str | None:
    """What is wrong with the size of an effect, of which only the median is known; None if nothing is."""
    if _LEAST_SHARE * expected <= measured <= _MOST_SHARE * expected:
        return None
    return (
        f"its effect is {measured / expected:.2g} times as large as when the adapter was made (median {measured:.2g} "
        f"nats, {expected:.2g} then)"
    )


def effect_in(probes: Sequence[LogprobProbe]) -> Effect | None:
    """The size of an adapter's effect on `FIXED_PROMPTS`, from its probes; None if they do not hold it."""
    fixed = [probe for probe in probes if probe.tokens in FIXED_PROMPTS and probe.base]
    if not fixed:
        return None
    apart = deviation([probe.logprobs for probe in fixed], [probe.base for probe in fixed])
    return Effect(median=apart.median, tokens=sum(len(probe.base) for probe in fixed))


def fixed_prompts(length: int) -> list[list[int]]:
    """Token ids for adapters without probes of their own, of 24 tokens and of each of `LENGTHS` that fits.

    Args:
        length: The most tokens of a prompt.
    """
    longer = [[3 + (13 * i * i + 29 * i + 17 * size) % 250 for i in range(size)] for size in cut_lengths(length)]
    return [prompt for prompt in FIXED_PROMPTS if len(prompt) <= length] + longer


def cut_lengths(length: int) -> list[int]:
    """`LENGTHS`, each as far as `length` allows, none twice."""
    return sorted({min(size, length) for size in LENGTHS if length >= 2})


def _flat(rows: Rows) -> Array:
    return numpy.array([value for row in rows for value in row], dtype=numpy.float64)
