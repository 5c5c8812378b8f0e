"""What is left out of preference pairs, and how far a rule that reads no content would get on them.

A judge learns whatever tells the better answer of a pair from the worse. Where the better one is nearly always the
longer, or nearly always one model's, that is what it learns; `auc` measures it and `select` takes it out.
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
"""Words in a row; prompts are alike by the share of these that they have in common."""
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_MARKUP = re.compile(r"\*\*|^#{1,6} |```|`[^`\n]+`|^\|.*\|$", re.MULTILINE)

STYLE: Mapping[str, Callable[[str], int]] = {
    "length": len,
    "lines": lambda text: text.count("\n"),
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "markup": lambda text: len(_MARKUP.findall(text)),
    "digits": lambda text: sum(map(str.isdigit, text)),
}
"""What can be counted of an answer without reading it."""


class Filters(Strict):
    """What is left out of the pairs.

    Attributes:
        per_prompt: The most pairs of one prompt from one source.
        dev_share: Share of the prompts held out for dev.
        near: Prompts are near duplicates from this share of common word triples (Jaccard) on; a training prompt near a
            dev prompt is left out, and any near an evaluation prompt. null: only equal prompts count.
        balance: What shall not tell the better answer: of two pairs that mirror each other in these, both are kept;
            what is left without its mirror image goes. See `matched`.
        min_margin: Preferences weaker than this go.
    """

    per_prompt: PositiveInt = 2
    dev_share: float = Field(default=0.1, ge=0, lt=1)
    near: float | None = Field(default=0.8, gt=0, le=1)
    balance: tuple[Trait, ...] = ("length",)
    min_margin: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True)
class Bias:
    """How well rules that read nothing do on pairs: areas under the ROC curve, ½ is chance.

    Attributes:
        pairs: How many pairs.
        auc: By rule: each of `STYLE`, the longer answer (or more lines, …) taken for the better one, and `model`, the
            author with the greater share of pairs won, where all authors are known.
    """

    pairs: int
    auc: dict[str, float]


@dataclass(frozen=True)
class Selection:
    """What the filters left.

    Attributes:
        train: The training pairs.
        dev: The dev pairs: of other prompts.
        left_out: How many pairs each filter took, in the order in which they work.
        before: The bias of the pairs that came to the balance.
        after: The bias of what is left of them.
        lengths: Characters that the better answer has more than the worse, of each pair before and after the balance.
    """

    train: list[Preference]
    dev: list[Preference]
    left_out: dict[str, int]
    before: Bias
    after: Bias
    lengths: tuple[list[int], list[int]] = field(repr=False)

    def less(self, kept: list[Preference], reason: str) -> "Selection":
        """The selection with only these of its training pairs; the others are counted under the reason."""
        left = [*kept, *self.dev]
        return Selection(
            train=kept,
            dev=self.dev,
            left_out={**self.left_out, reason: len(self.train) - len(kept)},
            before=self.before,
            after=bias(left),
            lengths=(self.lengths[0], [_longer(pair) for pair in left]),
        )


def select(
    preferences: Iterable[Preference],
    filters: Filters,
    *,
    against: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Selection:
    """Leaves out what should not be learned from, and splits by prompt.

    Args:
        preferences: From all sources.
        filters: What to leave out.
        against: Prompts of evaluation sets.
        weights: By source: their pairs are brought into this proportion by leaving some out; a source that is not
            named, or none at all: every pair.
        seed: Of every choice.
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
            kept = matched(own, filters.balance, filters.per_prompt, seed) if filters.balance else most
            units.append(kept)
            lost.append(len(own) - len(most))
            left_out["above the cap per prompt"] += len(own) - len(most)
            left_out["without a mirror image"] += len(most) - sum(map(len, kept))
            capped += [pair for unit in most for pair in unit]
        units, beyond = _weighted(units, weights or {})
        left_out["above the source's weight"] += beyond
        sides.append([pair for unit in _by_chance(itertools.chain(*units), seed) for pair in unit])
    kept_pairs = [*sides[0], *sides[1]]
    return Selection(
        train=sides[0],
        dev=sides[1],
        left_out=dict(left_out),
        before=bias(capped),
        after=bias(kept_pairs),
        lengths=([_longer(pair) for pair in capped], [_longer(pair) for pair in kept_pairs]),
    )


def bias(pairs: Sequence[Preference]) -> Bias:
    """How well rules that read nothing do on these pairs."""
    figures = {name: auc([count(pair.better) - count(pair.worse) for pair in pairs]) for name, count in STYLE.items()}
    if pairs and all(pair.models for pair in pairs):
        figures["model"] = auc(_by_author(pairs))
    return Bias(len(pairs), figures)


def auc(leanings: Sequence[float]) -> float:
    """The area under the ROC curve of a rule that judges pairs.

    Each pair is two examples: shown better first, the rule's score is its leaning; shown worse first, the leaning with
    the other sign. The area is the probability that an example of the first kind scores above one of the second, ties
    counting half; ½ where there is nothing to measure.

    Args:
        leanings: By pair: how far the rule prefers the better answer (below 0: the worse).
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
    """Keeps pairs in twos that mirror each other, and those that are their own mirror image.

    A pair's place is: by how many characters its better answer is longer or shorter (the size in one of `LENGTH_BINS`
    bins of equal content, and the sign), whether it has more or less markup and lists, who beat whom. Its mirror image
    has every sign the other way round and the authors exchanged. From each two opposite places equally many are
    taken, so that no rule on these traits is right more often than wrong; a pair without an opposite is left out.

    Args:
        pairs: Of one source.
        traits: What has to be mirrored; none: every pair stands for itself.
        per_prompt: The most of one prompt.
        seed: Of the choice where there are too many.

    Returns:
        Units of one or two pairs; leaving out a unit keeps the balance.
    """
    place = _places(pairs, traits)
    cells: dict[tuple[object, ...], list[Preference]] = defaultdict(list)
    for pair in _by_chance(((pair,) for pair in pairs), seed):
        cells[place(pair[0])[0]].append(pair[0])
    taken: Counter[str] = Counter()
    units: list[tuple[Preference, ...]] = []

    def unit_of(queues: Sequence[list[Preference]]) -> tuple[Preference, ...]:
        """The next pair of each queue whose prompt has room; nothing where one has none left."""
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

    opposite = {own: place(group[0])[1] for own, group in cells.items()}
    # Each two opposite places once, and one unit of each at a time, so that every place has its share of the cap.
    couples = sorted(
        {frozenset((own, other)) for own, other in opposite.items()}, key=lambda one: sorted(map(repr, one))
    )
    queues = [[cells.get(cell, []) for cell in sorted(couple, key=repr)] for couple in couples]
    while queues:
        further = [(couple, unit) for couple in queues if (unit := unit_of(couple))]
        units += [unit for _, unit in further]
        queues = [couple for couple, _ in further]
    return units


def near(prompts: Iterable[str], others: Iterable[str], threshold: float | None) -> set[str]:
    """Which of `others` are equal to one of `prompts`, or share with it so many of their word triples.

    Exact, not estimated: two sets whose Jaccard index is at least t share an element among the first n - ⌈tn⌉ + 1 of
    each, in any common order (prefix filtering: Bayardo, Ma and Srikant, WWW 2007, section 4), so only those are
    indexed, the rarest first.

    Args:
        prompts: What must not come back.
        others: Where it is looked for.
        threshold: The Jaccard index from which on two prompts are near; None: only equal ones, white space and case
            aside.
    """
    known, searched = {text: _shingles(text) for text in prompts}, {text: _shingles(text) for text in others}
    if threshold is None:
        equal = {" ".join(text.lower().split()) for text in known}
        return {text for text in searched if " ".join(text.lower().split()) in equal}
    frequency = Counter(shingle for sets in (known, searched) for found in sets.values() for shingle in found)

    def prefix(found: frozenset[str]) -> list[str]:
        ordered = sorted(found, key=lambda shingle: (frequency[shingle], shingle))
        return ordered[: len(ordered) - math.ceil(threshold * len(ordered)) + 1]

    index: dict[str, list[frozenset[str]]] = defaultdict(list)
    for found in set(known.values()):
        for shingle in prefix(found):
            index[shingle].append(found)

    def is_near(found: frozenset[str]) -> bool:
        candidates = {one for shingle in prefix(found) for one in index.get(shingle, ())}
        return any(len(found & one) >= threshold * len(found | one) for one in candidates)

    return {text for text, found in searched.items() if is_near(found)}


def _shingles(text: str) -> frozenset[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    if len(words) < SHINGLE:
        return frozenset((" ".join(words),))
    return frozenset(" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1))


def _distinct(preferences: Iterable[Preference], left_out: Counter[str]) -> list[Preference]:
    """One of each pair; none where it is preferred both ways round, nor where the answers cannot be told apart."""
    found: dict[tuple[str, str, str], Preference] = {}
    for pair in preferences:
        prompt, better, worse = (" ".join(text.split()) for text in (pair.prompt, pair.better, pair.worse))
        if not better or not worse or better == worse:
            left_out["empty or equal answers"] += 1
        elif (prompt, better, worse) in found:
            left_out["duplicates"] += 1
        else:
            found[prompt, better, worse] = pair
    both_ways = {key for key in found if (key[0], key[2], key[1]) in found}
    left_out["preferred both ways round"] += len(both_ways)
    return [pair for key, pair in found.items() if key not in both_ways]


def _without(
    pairs: list[Preference], left_out: Counter[str], reason: str, refused: Callable[[Preference], bool]
) -> list[Preference]:
    kept = [pair for pair in pairs if not refused(pair)]
    left_out[reason] += len(pairs) - len(kept)
    return kept


def _namer(pairs: Sequence[Preference]) -> Callable[[str], bool]:
    """Whether a text names one of the models. A name that is a plain word ("domain") may be said without naming it."""
    names = {name for pair in pairs for name in pair.models or () if len(name) > 2 and not name.isalpha()}
    if not names:
        return lambda _: False
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _places(
    pairs: Sequence[Preference], traits: Sequence[Trait]
) -> Callable[[Preference], tuple[tuple[object, ...], tuple[object, ...]]]:
    """Returns what says where a pair stands, and where its mirror image would."""
    sizes = sorted(abs(_longer(pair)) for pair in pairs if _longer(pair))
    edges = sorted({sizes[len(sizes) * bin_ // LENGTH_BINS] for bin_ in range(1, LENGTH_BINS)}) if sizes else []

    def place(pair: Preference) -> tuple[tuple[object, ...], tuple[object, ...]]:
        own: list[object] = []
        mirrored: list[object] = []
        for trait in traits:
            if trait == "model":
                own.append(pair.models)
                mirrored.append(pair.models and pair.models[::-1])
            elif trait == "length":
                longer = _longer(pair)
                signed = int(math.copysign(1 + bisect_left(edges, abs(longer)), longer)) if longer else 0
                own.append(signed)
                mirrored.append(-signed)
            else:
                more = sum(STYLE[name](pair.better) - STYLE[name](pair.worse) for name in ("list items", "markup"))
                sign = (more > 0) - (more < 0)
                own.append(sign)
                mirrored.append(-sign)
        return tuple(own), tuple(mirrored)

    return place


def _origin(pair: Preference) -> str:
    """The source, without what stands behind a colon: what was done to its answers."""
    return pair.source.partition(":")[0]


def _longer(pair: Preference) -> int:
    return len(pair.better) - len(pair.worse)


def _by_author(pairs: Sequence[Preference]) -> list[float]:
    """How far each pair's better answer has the author that won more often, counted on these very pairs.

    In sample: there are few authors and many pairs, and counted on other folds the rule falls below chance on pairs
    that are balanced exactly.
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
    """The units of each source, so many that their pairs are as the weights; and how many pairs that left out."""
    sizes = [(_origin(units[0][0]), sum(map(len, units))) for units in by_source if units]
    shares = [size / weights[name] for name, size in sizes if name in weights]
    kept: list[list[tuple[Preference, ...]]] = []
    beyond = 0
    for units in by_source:
        weight = weights.get(_origin(units[0][0])) if units else None
        if weight is None:
            kept.append(units)
            continue
        room = round(weight * min(shares))
        own: list[tuple[Preference, ...]] = []
        for unit in units:
            if len(unit) <= room:
                own.append(unit)
                room -= len(unit)
            else:
                beyond += len(unit)
        kept.append(own)
    return kept, beyond


def _by_chance(units: Iterable[tuple[Preference, ...]], seed: int) -> list[tuple[Preference, ...]]:
    """In an order that has nothing to do with the content and is the same every time."""
    return sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit[0].key}".encode()).hexdigest())
