"""Filters of preference pairs, and how well rules that read no content do on the pairs.

A judge learns whatever separates the better answer of a pair from the worse. If the better one is nearly always the
longer, or nearly always one model's, the judge learns just that. `auc` measures such a bias and `select` removes it.
"""

import hashlib
import itertools
import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PositiveInt

from mixfuse.contracts.strict_yaml import Strict
from mixfuse.train.data.pairs import Preference, is_dev

Trait = Literal["length", "style", "model"]

LENGTH_BINS = 12
SHINGLE = 3
"""Words in a shingle; two prompts are similar by the share of shingles that they have in common."""
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_MARKUP = re.compile(r"\*\*|^#{1,6} |```|`[^`\n]+`|^\|.*\|$", re.MULTILINE)

STYLE: Mapping[str, Callable[[str], int]] = {
    "length": len,
    "lines": lambda text: text.count("\n"),
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "markup": lambda text: len(_MARKUP.findall(text)),
    "digits": lambda text: sum(map(str.isdigit, text)),
}
"""Features of an answer that can be counted without understanding it."""


class Filters(Strict):
    """Which pairs are left out.

    Attributes:
        per_prompt: The most pairs of one prompt from one source.
        dev_share: Share of the prompts held out for dev.
        near: Two prompts are near duplicates if they share at least this share of word triples (Jaccard). A training
            prompt near a dev prompt is left out, and so is any prompt near an evaluation prompt. null: only equal
            prompts count.
        balance: Traits that must not predict the better answer. A pair stays only together with a pair that mirrors it
            in these traits; see `matched`.
        min_margin: Weaker preferences are left out.
    """

    per_prompt: PositiveInt = 2
    dev_share: float = Field(default=0.1, ge=0, lt=1)
    near: float | None = Field(default=0.8, gt=0, le=1)
    balance: tuple[Trait, ...] = ("length",)
    min_margin: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True)
class Bias:
    """How well rules that read no content do on pairs: areas under the ROC curve, ½ is chance.

    Attributes:
        pairs: Number of pairs.
        auc: By rule. Each rule of `STYLE` prefers the longer answer (or more lines, …). `model` prefers the author with
            the greater share of pairs won, if all authors are known.
    """

    pairs: int
    auc: dict[str, float]


@dataclass(frozen=True)
class Selection:
    """The pairs after all filters.

    Attributes:
        train: The training pairs.
        dev: The dev pairs, of other prompts.
        left_out: Number of pairs that each filter removed, in the order of the filters.
        before: The bias of the pairs before balancing.
        after: The bias after it.
        lengths: By how many characters the better answer is longer, for each pair before and after balancing.
    """

    train: list[Preference]
    dev: list[Preference]
    left_out: dict[str, int]
    before: Bias
    after: Bias
    lengths: tuple[list[int], list[int]] = field(repr=False)

    def with_train(self, train: list[Preference], reason: str) -> "Selection":
        """The selection with only these of its training pairs; the others count as left out for the reason."""
        pairs = [*train, *self.dev]
        return Selection(
            train=train,
            dev=self.dev,
            left_out={**self.left_out, reason: len(self.train) - len(train)},
            before=self.before,
            after=bias(pairs),
            lengths=(self.lengths[0], [_extra_length(pair) for pair in pairs]),
        )


def select(
    preferences: Iterable[Preference],
    filters: Filters,
    *,
    against: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Selection:
    """Applies all filters and splits by prompt.

    Args:
        preferences: The pairs of all sources.
        filters: The filters' settings.
        against: Prompts of evaluation sets.
        weights: By source. Pairs are left out until the sources' numbers of pairs have this proportion. A source that
            is not named keeps every pair.
        seed: Seed of every random choice.
    """
    left_out: Counter[str] = Counter()
    pairs = _distinct(preferences, left_out)
    pairs = _without(pairs, left_out, "too weak", lambda pair: pair.margin < filters.min_margin)
    named = _namer(pairs)
    pairs = _without(pairs, left_out, "an answer names its model", lambda pair: named(f"{pair.better}\n{pair.worse}"))
    leaked = near(against, {pair.prompt for pair in pairs}, filters.near)
    pairs = _without(pairs, left_out, "in an evaluation set", lambda pair: pair.prompt in leaked)
    held_out = {prompt for prompt in {pair.prompt for pair in pairs} if is_dev(prompt, filters.dev_share)}
    copied = near(sorted(held_out), {pair.prompt for pair in pairs} - held_out, filters.near)
    pairs = _without(pairs, left_out, "near a dev prompt", lambda pair: pair.prompt in copied)

    by_side = [[pair for pair in pairs if (pair.prompt in held_out) is dev] for dev in (False, True)]
    sides: list[list[Preference]] = []
    capped: list[Preference] = []
    for side in by_side:
        units, lost = [], []
        for _, group in itertools.groupby(sorted(side, key=_origin), key=_origin):
            own = list(group)
            most = matched(own, (), filters.per_prompt, seed)
            balanced = matched(own, filters.balance, filters.per_prompt, seed) if filters.balance else most
            units.append(balanced)
            lost.append(len(own) - len(most))
            left_out["above the cap per prompt"] += len(own) - len(most)
            left_out["without a mirror image"] += len(most) - sum(map(len, balanced))
            capped += [pair for unit in most for pair in unit]
        units, beyond = _weighted(units, weights or {})
        left_out["above the source's weight"] += beyond
        sides.append([pair for unit in _shuffled(itertools.chain(*units), seed) for pair in unit])
    remaining = [*sides[0], *sides[1]]
    return Selection(
        train=sides[0],
        dev=sides[1],
        left_out=dict(left_out),
        before=bias(capped),
        after=bias(remaining),
        lengths=([_extra_length(pair) for pair in capped], [_extra_length(pair) for pair in remaining]),
    )


def bias(pairs: Sequence[Preference]) -> Bias:
    """How well rules that read no content do on these pairs."""
    figures = {name: auc([count(pair.better) - count(pair.worse) for pair in pairs]) for name, count in STYLE.items()}
    if pairs and all(pair.models for pair in pairs):
        figures["model"] = auc(_by_author(pairs))
    return Bias(len(pairs), figures)


def auc(leanings: Sequence[float]) -> float:
    """The area under the ROC curve of a rule that judges pairs.

    Each pair is two examples. With the better answer first, the rule's score is its preference; with the worse first,
    the negated preference. The area is the probability that an example of the first kind scores above one of the
    second; ties count half. Without pairs it is ½.

    Args:
        leanings: For each pair, how strongly the rule prefers the better answer (below 0: the worse).
    """
    if not leanings:
        return 0.5
    negative = sorted(-leaning for leaning in leanings)
    below = Counter(leanings)
    area = 0.0
    for leaning, count in below.items():
        less = bisect_left(negative, leaning)
        equal = below.get(-leaning, 0)
        area += count * (less + equal / 2)
    return area / len(leanings) ** 2


def matched(
    pairs: Sequence[Preference], traits: Sequence[Trait], per_prompt: int, seed: int
) -> list[tuple[Preference, ...]]:
    """Selects pairs in twos that mirror each other, and pairs that are their own mirror image.

    A pair's cell is: by how many characters its better answer is longer or shorter (the sign, and the size in one of
    `LENGTH_BINS` bins of equal counts), whether it has more or less markup and lists, and who beat whom. In the
    mirrored cell every sign is reversed and the authors are exchanged. Equally many pairs are taken from each two
    mirrored cells, so that no rule on these traits is right more often than wrong. A pair without a counterpart is left
    out.

    Args:
        pairs: The pairs of one source.
        traits: The traits to mirror; without any, every pair is a unit.
        per_prompt: The most pairs of one prompt.
        seed: Seed of the choice among too many pairs.

    Returns:
        Units of one or two pairs. Leaving out a whole unit preserves the balance.
    """
    cells_of = _cells(pairs, traits)
    cells: dict[tuple[object, ...], list[Preference]] = defaultdict(list)
    for pair in _shuffled(((pair,) for pair in pairs), seed):
        cells[cells_of(pair[0])[0]].append(pair[0])
    taken: Counter[str] = Counter()
    units: list[tuple[Preference, ...]] = []

    def unit_of(queues: Sequence[list[Preference]]) -> tuple[Preference, ...]:
        """The next pair of each queue whose prompt is below the cap; empty if a queue has none left."""
        unit: list[Preference] = []
        for queue in queues:
            while queue and taken[queue[-1].prompt] >= per_prompt:
                queue.pop()
            if queue:
                unit.append(queue.pop())
                taken[unit[-1].prompt] += 1
        if len(unit) < len(queues):
            taken.subtract(pair.prompt for pair in unit)
            return ()
        return tuple(unit)

    opposite = {own: cells_of(group[0])[1] for own, group in cells.items()}
    # Each two mirrored cells once, and one unit of each in turn, so that every cell gets its share of the cap.
    couples = sorted(
        {frozenset((own, other)) for own, other in opposite.items()}, key=lambda cells: sorted(map(repr, cells))
    )
    queues = [[cells.get(cell, []) for cell in sorted(couple, key=repr)] for couple in couples]
    while queues:
        further = [(couple, unit) for couple in queues if (unit := unit_of(couple))]
        units += [unit for _, unit in further]
        queues = [couple for couple, _ in further]
    return units


def near(prompts: Iterable[str], others: Iterable[str], threshold: float | None) -> set[str]:
    """Those of `others` that equal one of `prompts`, or share enough of their word triples with one.

    Exact, not estimated: two sets whose Jaccard index is at least t share an element among the first n - ⌈tn⌉ + 1 of
    each, in any common order (prefix filtering: Bayardo, Ma and Srikant, WWW 2007, section 4), so only those are
    indexed, the rarest first.

    Args:
        prompts: The prompts to keep apart from.
        others: The prompts to search.
        threshold: The Jaccard index at which two prompts are near. None: only equal ones count, ignoring white space
            and case.
    """
    known, searched = {text: _shingles(text) for text in prompts}, {text: _shingles(text) for text in others}
    if threshold is None:
        equal = {" ".join(text.lower().split()) for text in known}
        return {text for text in searched if " ".join(text.lower().split()) in equal}
    frequency = Counter(shingle for sets in (known, searched) for shingles in sets.values() for shingle in shingles)

    def prefix(shingles: frozenset[str]) -> list[str]:
        ordered = sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))
        return ordered[: len(ordered) - math.ceil(threshold * len(ordered)) + 1]

    index: dict[str, list[frozenset[str]]] = defaultdict(list)
    for shingles in set(known.values()):
        for shingle in prefix(shingles):
            index[shingle].append(shingles)

    def is_near(shingles: frozenset[str]) -> bool:
        candidates = {other for shingle in prefix(shingles) for other in index.get(shingle, ())}
        return any(len(shingles & other) >= threshold * len(shingles | other) for other in candidates)

    return {text for text, shingles in searched.items() if is_near(shingles)}


def _shingles(text: str) -> frozenset[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    if len(words) < SHINGLE:
        return frozenset((" ".join(words),))
    return frozenset(" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1))


def _distinct(preferences: Iterable[Preference], left_out: Counter[str]) -> list[Preference]:
    """Each pair once, without pairs preferred both ways round, and without empty or equal answers."""
    distinct: dict[tuple[str, str, str], Preference] = {}
    for pair in preferences:
        prompt, better, worse = (" ".join(text.split()) for text in (pair.prompt, pair.better, pair.worse))
        if not better or not worse or better == worse:
            left_out["empty or equal answers"] += 1
        elif (prompt, better, worse) in distinct:
            left_out["duplicates"] += 1
        else:
            distinct[prompt, better, worse] = pair
    both_ways = {key for key in distinct if (key[0], key[2], key[1]) in distinct}
    left_out["preferred both ways round"] += len(both_ways)
    return [pair for key, pair in distinct.items() if key not in both_ways]


def _without(
    pairs: list[Preference], left_out: Counter[str], reason: str, refused: Callable[[Preference], bool]
) -> list[Preference]:
    remaining = [pair for pair in pairs if not refused(pair)]
    left_out[reason] += len(pairs) - len(remaining)
    return remaining


def _namer(pairs: Sequence[Preference]) -> Callable[[str], bool]:
    """A test whether a text names one of the models. Names that are plain words ("domain") do not count."""
    names = {name for pair in pairs for name in pair.models or () if len(name) > 2 and not name.isalpha()}
    if not names:
        return lambda _: False
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _cells(
    pairs: Sequence[Preference], traits: Sequence[Trait]
) -> Callable[[Preference], tuple[tuple[object, ...], tuple[object, ...]]]:
    """A function from a pair to its cell and the mirrored cell."""
    sizes = sorted(abs(_extra_length(pair)) for pair in pairs if _extra_length(pair))
    edges = sorted({sizes[len(sizes) * bin_ // LENGTH_BINS] for bin_ in range(1, LENGTH_BINS)}) if sizes else []

    def cells_of(pair: Preference) -> tuple[tuple[object, ...], tuple[object, ...]]:
        own: list[object] = []
        mirrored: list[object] = []
        for trait in traits:
            if trait == "model":
                own.append(pair.models)
                mirrored.append(pair.models and pair.models[::-1])
            elif trait == "length":
                longer = _extra_length(pair)
                signed = int(math.copysign(1 + bisect_left(edges, abs(longer)), longer)) if longer else 0
                own.append(signed)
                mirrored.append(-signed)
            else:
                more = sum(STYLE[name](pair.better) - STYLE[name](pair.worse) for name in ("list items", "markup"))
                sign = (more > 0) - (more < 0)
                own.append(sign)
                mirrored.append(-sign)
        return tuple(own), tuple(mirrored)

    return cells_of


def _origin(pair: Preference) -> str:
    """The source without the part after a colon, which says how its answers were altered."""
    return pair.source.partition(":")[0]


def _extra_length(pair: Preference) -> int:
    return len(pair.better) - len(pair.worse)


def _by_author(pairs: Sequence[Preference]) -> list[float]:
    """How strongly a rule on authors prefers each pair's better answer: the difference of the authors' shares of wins.

    Shares are counted on the same pairs. There are few authors and many pairs; with shares from other folds, the rule
    would fall below chance on exactly balanced pairs.
    """
    won = Counter(pair.models[0] for pair in pairs if pair.models)
    met = Counter(name for pair in pairs for name in pair.models or ())
    return [
        won[pair.models[0]] / met[pair.models[0]] - won[pair.models[1]] / met[pair.models[1]] if pair.models else 0.0
        for pair in pairs
    ]


def _weighted(
    by_source: list[list[tuple[Preference, ...]]], weights: Mapping[str, float]
) -> tuple[list[list[tuple[Preference, ...]]], int]:
    """The units of each source, cut to the proportion of the weights, and the number of pairs left out."""
    sizes = [(_origin(units[0][0]), sum(map(len, units))) for units in by_source if units]
    shares = [size / weights[name] for name, size in sizes if name in weights]
    selected: list[list[tuple[Preference, ...]]] = []
    beyond = 0
    for units in by_source:
        weight = weights.get(_origin(units[0][0])) if units else None
        if weight is None:
            selected.append(units)
            continue
        room = round(weight * min(shares))
        own: list[tuple[Preference, ...]] = []
        for unit in units:
            if len(unit) <= room:
                own.append(unit)
                room -= len(unit)
            else:
                beyond += len(unit)
        selected.append(own)
    return selected, beyond


def _shuffled(units: Iterable[tuple[Preference, ...]], seed: int) -> list[tuple[Preference, ...]]:
    """The units in an order that is independent of the content and reproducible."""
    return sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit[0].key}".encode()).hexdigest())
