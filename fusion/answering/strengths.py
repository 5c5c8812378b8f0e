"""How strong a judge finds each of several answers, from what it said of pairs of them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """What a judge said of two answers of one question.

    Attributes:
        judge: The judge's name.
        first: Index of the first answer.
        second: Index of the second answer.
        log_odds: Log-odds, averaged over both orders, that the first is better.
    """

    judge: str
    first: int
    second: int
    log_odds: float


def strengths(classes: Sequence[Sequence[int]], comparisons: Sequence[Comparison]) -> list[float]:
    """How strong a judge finds each class, in nats: Bradley-Terry by least squares on its log-odds, mean 0.

    Args:
        classes: The places of each class's answers.
        comparisons: By one judge; those between two answers of one class say nothing.
    """
    of = {place: number for number, places in enumerate(classes) for place in places}
    met: dict[tuple[int, int], list[float]] = {}
    for comparison in comparisons:
        first, second = of[comparison.first], of[comparison.second]
        if first != second:
            met.setdefault((first, second), []).append(comparison.log_odds)
            met.setdefault((second, first), []).append(-comparison.log_odds)
    against: list[list[tuple[int, float]]] = [[] for _ in classes]
    for (first, second), odds in met.items():
        against[first].append((second, sum(odds) / len(odds)))
    strength = [0.0] * len(classes)
    for _ in range(50):  # Gauss-Seidel; the ridge keeps classes that never met where they are
        for number, rivals in enumerate(against):
            if rivals:
                strength[number] = sum(odds + strength[rival] for rival, odds in rivals) / (len(rivals) + 0.1)
    mean = sum(strength) / len(strength)
    return [value - mean for value in strength]
