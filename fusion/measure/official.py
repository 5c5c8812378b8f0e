"""Public judge benchmarks' own metrics, computed from a pairwise judge's verdicts in both orders.

Each is the published rule, so that a figure can be compared with a leaderboard. None of them shows an order flip the
way `both_orders_correct` does.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixfuse.contracts.preferences import REWARDBENCH_SECTIONS
from mixfuse.fusion.measure.comparisons import TIES, Benchmark, Comparison
from mixfuse.fusion.measure.marks import Views, preferred
from mixfuse.fusion.measure.statistics import Clusters, Estimate

# JudgeBench's four groups, by the prefix of their sources (run_judge.py).
_JUDGEBENCH_GROUPS = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
_EVEN = 1e-9  # log-odds no further from 0 prefer neither answer
_SMALLEST = 1e-6  # probabilities are kept this far from 0 and 1 before their log-odds are taken


class _Judged(NamedTuple):
    row: Comparison
    view: Views


def official(rows: Sequence[Comparison], views: Sequence[Views]) -> dict[str, dict[str, Any]]:
    """The metrics of every benchmark that has rows here: benchmark → metric → figure.

    A judge's calibration changes none of them: the rules use signs and ratios of log-odds, and no margin for ties.

    Args:
        rows: Pairs of any origin.
        views: The judge's, in the same order.
    """
    rules: dict[Benchmark, Callable[[Sequence[_Judged]], dict[str, Any]]] = {
        "judgebench": _judgebench,
        "llmbar": _llmbar,
        "rewardbench": _rewardbench,
        "rewardbench2": _rewardbench2,
        "rmbench": _rmbench,
        "ppe": _ppe,
    }
    judged = [_Judged(row, view) for row, view in zip(rows, views, strict=True)]
    by_benchmark = {name: [pair for pair in judged if pair.row.benchmark == name] for name in rules}
    return {name: rule(by_benchmark[name]) for name, rule in rules.items() if by_benchmark[name]}


def _judgebench(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Both games together (utils/metrics.py): a pair is correct if more games are right than wrong.

    A game without a verdict is neither. So right in one order and unread in the other is correct; right in one order
    and wrong in the other is not.
    """
    decided = [pair for pair in judged if pair.row.label != "tie"]
    won = [float(sum(_games(pair)) > 0) for pair in decided]
    metrics = {"accuracy": _mean(decided, won)}
    for group, prefix in _JUDGEBENCH_GROUPS.items():
        inside = [place for place, pair in enumerate(decided) if pair.row.source.startswith(prefix)]
        if inside:
            metrics[group] = _mean([decided[place] for place in inside], [won[place] for place in inside])
    return {name: estimate.to_json() for name, estimate in metrics.items()}


def _games(pair: _Judged) -> tuple[int, int]:
    """For each order: 1 for the right answer, -1 for the wrong one, 0 for no verdict."""
    forward, backward = preferred(pair.view.forward), preferred(pair.view.backward)
    turned = backward and ("second" if backward == "first" else "first")

    def game(winner: str | None) -> int:
        return 0 if winner is None else 1 if winner == pair.row.label else -1

    return game(forward), game(turned)


def _llmbar(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Accuracy averaged over both orders, and how often both orders name the same answer (evaluate.py)."""
    games = [_games(pair) for pair in judged]
    correct = [sum(game == 1 for game in both) / 2 for both in games]
    agree = [float(both[0] == both[1]) for both in games]
    return {
        "accuracy_average": _mean(judged, correct).to_json(),
        "positional_agreement": _mean(judged, agree).to_json(),
    }


def _mean(judged: Sequence[_Judged], values: Sequence[float]) -> Estimate:
    return Clusters([pair.row.prompt for pair in judged]).mean(values)


def _rewardbench2(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Best of four by subset, the Ties score, and their plain mean (arXiv 2506.01937, rewardbench/utils.py).

    The published rules take one score for each answer. A pairwise judge gives log-odds between answers. If the judge
    scores answers, the log-odds are differences of scores, and the result is exactly the published figure.
    """
    items: dict[tuple[str, str], list[_Judged]] = defaultdict(list)
    for pair in judged:
        items[pair.row.source, pair.row.item].append(pair)
    subsets: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    ties: dict[str, _TieStats] = {}
    for (subset, item), pairs in items.items():
        if subset == TIES:
            ties[item] = _tie_stats(pairs)
        else:
            subsets[subset].append(_best_of(pairs))
            prompts[subset].append(pairs[0].row.prompt)
    metrics: dict[str, Any] = {name: Clusters(prompts[name]).mean(marks).to_json() for name, marks in subsets.items()}
    if ties:
        ids = sorted({item.partition(":")[2] for item in ties})
        metrics[TIES] = Clusters(ids).estimate(lambda drawn: ties_score(ties, [ids[n] for n in drawn])).to_json()
    metrics["score"] = sum(metric["value"] for metric in metrics.values()) / len(metrics)
    return metrics


def _rewardbench(judged: Sequence[_Judged]) -> dict[str, Any]:
    """The four sections and their plain mean (arXiv 2403.13787, rewardbench/utils.py); a tie counts half.

    A section is the mean of its subsets, weighted by their sizes, so that half of Reasoning is mathematics.
    """
    metrics: dict[str, Any] = {}
    for section, sizes in REWARDBENCH_SECTIONS.items():
        inside = [pair for pair in judged if pair.row.source in sizes]
        if inside:
            metrics[section] = _weighted(inside, [_won(pair) for pair in inside], sizes).to_json()
    metrics["score"] = sum(metric["value"] for metric in metrics.values()) / len(metrics)
    return metrics


def _weighted(judged: Sequence[_Judged], values: Sequence[float], sizes: Mapping[str, int]) -> Estimate:
    """The mean of the subsets' means, by the subsets' sizes."""
    subsets = np.array([pair.row.source for pair in judged])
    marks = np.array(values)

    def mean(drawn: npt.NDArray[np.intp]) -> float:
        parts = {name: marks[drawn][subsets[drawn] == name] for name in set(subsets[drawn])}
        weight = sum(sizes[name] for name in parts)
        return float(sum(sizes[name] * part.mean() for name, part in parts.items()) / weight)

    return Clusters([pair.row.prompt for pair in judged]).estimate(mean)


def _rmbench(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Each domain, and hard, normal and easy over the domains (arXiv 2410.16184, table 3).

    A right answer meets wrong ones in three styles: in the same one (normal), in a plainer one (easy), or in one that
    looks better (hard). A domain is the mean of the three; the two safety domains count as one.
    """
    by_domain: dict[str, dict[str, dict[str, list[_Judged]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for pair in judged:
        own, other = pair.row.cell or (0, 0)
        level = "normal" if own == other else "easy" if own > other else "hard"
        domain = "safety" if pair.row.source.startswith("safety") else pair.row.source
        by_domain[domain][pair.row.source][level].append(pair)
    levels = ("hard", "normal", "easy")
    shares: dict[str, dict[str, float]] = {}
    for domain, parts in by_domain.items():
        shares[domain] = {
            level: _plain_mean(
                [_mean(part[level], [_won(pair, tie=0.0) for pair in part[level]]).value for part in parts.values()]
            )
            for level in levels
        }
    metrics = {level: _plain_mean([share[level] for share in shares.values()]) for level in levels}
    metrics |= {domain: _plain_mean(list(share.values())) for domain, share in shares.items()}
    metrics["score"] = _plain_mean([metrics[level] for level in levels])
    return metrics


def _plain_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ppe(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Accuracy on the pairs that people or tests decided (arXiv 2410.14872); a tie of the judge counts half."""
    decided = [pair for pair in judged if pair.row.label != "tie"]
    if not decided:
        return {}
    metrics = {"accuracy": _mean(decided, [_won(pair) for pair in decided]).to_json()}
    for source in sorted({pair.row.source for pair in decided} - {""}):
        inside = [pair for pair in decided if pair.row.source == source]
        metrics[source] = _mean(inside, [_won(pair) for pair in inside]).to_json()
    return metrics


def _won(pair: _Judged, *, tie: float = 0.5) -> float:
    """1 where the right answer has the better odds, `tie` where neither has."""
    odds = _odds_for_the_better(pair)
    return tie if abs(odds) <= _EVEN else float(odds > 0)


def _odds_for_the_better(pair: _Judged) -> float:
    """Log-odds, in nats, that the right answer is the better one: the mean over the orders that were read, else 0."""
    forward, backward = pair.view
    read = [_logit(p) for p in (forward, None if backward is None else 1 - backward) if p is not None]
    return pair.row.toward_better(sum(read) / len(read) if read else 0.0)


def _logit(p: float) -> float:
    p = min(max(p, _SMALLEST), 1 - _SMALLEST)
    return math.log(p / (1 - p))


def _best_of(pairs: Sequence[_Judged]) -> float:
    """1 where the right answer beats every wrong one; in a tie for the first place its share of it."""
    odds = [_odds_for_the_better(pair) for pair in pairs]
    if any(value < -_EVEN for value in odds):
        return 0.0
    return 1 / (1 + sum(value <= _EVEN for value in odds))


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
    for pair in pairs:
        odds[pair.row.better].append(_odds_for_the_better(pair))
    strength = [sum(values) / len(values) for values in odds.values()]
    spread = max(strength) - min(strength) if len(strength) > 1 else None
    return _TieStats(min(min(values) for values in odds.values()), spread)


def ties_score(stats: dict[str, _TieStats], ids: Sequence[str]) -> float | None:
    """The Ties score of these prompts: accuracy, and whether right answers lie closer together than to wrong ones.

    Args:
        stats: By the rows' ids: `ref:N` with one right answer, `tied:N` with several.
        ids: The numbers N, each as often as it was drawn.
    """
    ref = [stats[f"ref:{n}"] for n in ids if f"ref:{n}" in stats]
    tied = [stats[f"tied:{n}"] for n in ids if f"tied:{n}" in stats]
    both = [
        (stats[f"ref:{n}"].gap, stats[f"tied:{n}"].gap, stats[f"tied:{n}"].spread or 0.0)
        for n in ids
        if f"ref:{n}" in stats and f"tied:{n}" in stats
    ]
    accuracies = [_share([prompt.gap > 0 for prompt in part]) for part in (tied, ref)]
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


def _share(true: Sequence[bool]) -> float:
    return sum(true) / len(true) if true else 0.0
