"""Public judge benchmarks' own metrics, worked out from a pairwise judge's verdicts in both orders.

Each is the published rule, so that a figure can stand beside a leaderboard; none of them shows an order flip the way
`both_orders_correct` does.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixfuse.fusion.measure.comparisons import TIES, Benchmark, Comparison, Views, leans
from mixfuse.fusion.measure.statistics import Clusters, Figure

# JudgeBench's four groups, by how their sources begin (run_judge.py).
_JUDGEBENCH_GROUPS = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
_SMALLEST = 1e-6  # probabilities are kept so far from 0 and 1 where log-odds are taken


class _Judged(NamedTuple):
    row: Comparison
    view: Views


def official(rows: Sequence[Comparison], views: Sequence[Views]) -> dict[str, dict[str, Any]]:
    """The metrics of every benchmark of which there are rows: benchmark → metric → figure.

    A judge's calibration changes none of them: they read signs and ratios of log-odds, and know no margin for ties.

    Args:
        rows: Pairs of any origin.
        views: The judge's, in the same order.
    """
    rules: dict[Benchmark, Callable[[Sequence[_Judged]], dict[str, Any]]] = {
        "judgebench": _judgebench,
        "llmbar": _llmbar,
        "rewardbench2": _rewardbench2,
    }
    judged = [_Judged(row, view) for row, view in zip(rows, views, strict=True)]
    own = {name: [one for one in judged if one.row.benchmark == name] for name in rules}
    return {name: rule(own[name]) for name, rule in rules.items() if own[name]}


def _judgebench(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Both games together (utils/metrics.py): a pair counts as correct if more games say so than say the contrary.

    A game without a verdict says neither. So right in one order and unread in the other is correct, right in one and
    wrong in the other is not.
    """
    decided = [one for one in judged if one.row.label != "tie"]
    won = [float(sum(_games(one)) > 0) for one in decided]
    found = {"accuracy": _mean(decided, won)}
    for group, prefix in _JUDGEBENCH_GROUPS.items():
        inside = [place for place, one in enumerate(decided) if one.row.source.startswith(prefix)]
        if inside:
            found[group] = _mean([decided[place] for place in inside], [won[place] for place in inside])
    return {name: figure.to_json() for name, figure in found.items()}


def _games(one: _Judged) -> tuple[int, int]:
    """Each order: 1 for the right answer, -1 for the wrong one, 0 for none."""
    forward, backward = leans(one.view.forward), leans(one.view.backward)
    turned = {"first": "second", "second": "first"}.get(backward, "nothing")

    def game(said: str) -> int:
        return 0 if said == "nothing" else 1 if said == one.row.label else -1

    return game(forward), game(turned)


def _llmbar(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Accuracy averaged over both orders, and how often both orders name the same answer (evaluate.py)."""
    games = [_games(one) for one in judged]
    correct = [sum(game == 1 for game in pair) / 2 for pair in games]
    agree = [float(pair[0] == pair[1]) for pair in games]
    return {
        "accuracy_average": _mean(judged, correct).to_json(),
        "positional_agreement": _mean(judged, agree).to_json(),
    }


def _mean(judged: Sequence[_Judged], values: Sequence[float]) -> Figure:
    return Clusters([one.row.prompt for one in judged]).mean(values)


def _rewardbench2(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Best of four by subset, the Ties score, and their plain mean (arXiv 2506.01937, rewardbench/utils.py).

    The published rules read one score an answer. A pairwise judge gives log-odds between answers; where it has a score
    behind it they are the scores' differences, and what is computed here is the published figure exactly.
    """
    items: dict[tuple[str, str], list[_Judged]] = defaultdict(list)
    for one in judged:
        items[one.row.source, one.row.item].append(one)
    subsets: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    ties: dict[str, _TieStats] = {}
    for (subset, item), pairs in items.items():
        if subset == TIES:
            ties[item] = _tie_stats(pairs)
        else:
            subsets[subset].append(_best_of(pairs))
            prompts[subset].append(pairs[0].row.prompt)
    found: dict[str, Any] = {name: Clusters(prompts[name]).mean(marks).to_json() for name, marks in subsets.items()}
    if ties:
        ids = sorted({item.partition(":")[2] for item in ties})
        figure = Clusters(ids).of(lambda drawn: ties_score(ties, [ids[index] for index in drawn]))
        found[TIES] = figure.to_json()
    found["score"] = sum(figure["value"] for figure in found.values()) / len(found)
    return found


def _odds_for_the_better(one: _Judged) -> float:
    """Log-odds, in nats, that the right answer is the better one: the mean over the orders that were read, else 0."""
    forward, backward = one.view
    read = [_logit(p) for p in (forward, None if backward is None else 1 - backward) if p is not None]
    odds = sum(read) / len(read) if read else 0.0
    return odds if one.row.label == "first" else -odds


def _logit(p: float) -> float:
    p = min(max(p, _SMALLEST), 1 - _SMALLEST)
    return math.log(p / (1 - p))


def _best_of(pairs: Sequence[_Judged]) -> float:
    """1 where the right answer beats every wrong one; where it shares the first place with some, its share of it."""
    odds = [_odds_for_the_better(one) for one in pairs]
    if any(value < -1e-9 for value in odds):
        return 0.0
    return 1 / (1 + sum(value <= 1e-9 for value in odds))


class _TieStats(NamedTuple):
    """One prompt of the Ties subset, in nats.

    Attributes:
        gap: From the worst right answer down to the best wrong one.
        spread: From the best right answer down to the worst; None with one right answer.
    """

    gap: float
    spread: float | None


def _tie_stats(pairs: Sequence[_Judged]) -> _TieStats:
    odds: dict[str, list[float]] = defaultdict(list)
    for one in pairs:
        right = one.row.first if one.row.label == "first" else one.row.second
        odds[right].append(_odds_for_the_better(one))
    strength = [sum(values) / len(values) for values in odds.values()]
    spread = max(strength) - min(strength) if len(strength) > 1 else None
    return _TieStats(min(min(values) for values in odds.values()), spread)


def ties_score(stats: dict[str, _TieStats], ids: Sequence[str]) -> float | None:
    """The Ties score of these prompts: accuracy, and right answers closer to one another than to wrong ones.

    Args:
        stats: By the rows' ids: `ref:N` with one right answer, `tied:N` with several.
        ids: The numbers N, as often as each is drawn.
    """
    ref = [stats[f"ref:{one}"] for one in ids if f"ref:{one}" in stats]
    tied = [stats[f"tied:{one}"] for one in ids if f"tied:{one}" in stats]
    both = [
        (stats[f"ref:{one}"].gap, stats[f"tied:{one}"].gap, stats[f"tied:{one}"].spread or 0.0)
        for one in ids
        if f"ref:{one}" in stats and f"tied:{one}" in stats
    ]
    accuracies = [_share([one.gap > 0 for one in part]) for part in (tied, ref)]
    preferred = _share([tied_gap > spread for _, tied_gap, spread in both])
    preferred_hard = _share([min(ref_gap, tied_gap) > spread for ref_gap, tied_gap, spread in both])
    margin = [_margin(min(ref_gap, tied_gap), spread) for ref_gap, tied_gap, spread in both]
    return (
        0.3 * sum(accuracies)
        + 0.2 * preferred
        + 0.2 * preferred_hard
        + 0.01 * (sum(margin) / len(margin) if margin else 0.0)
    )


def _margin(gap: float, spread: float) -> float:
    if spread == 0:
        return float((gap > 0) - (gap < 0))
    return math.tanh(gap / spread - 1)


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held) if held else 0.0
