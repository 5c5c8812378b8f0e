"""What weighing recorded answers is worth: real answers of real models, fitted on `train` and measured on `dev`.

    .venv/bin/python benchmarks/combiner.py --data ../shared/data [--pools NAME …] [--out FILE] [--json]

For each pool: the best member (chosen on `train`), the majority, votes weighed by each member's own log-odds, the
combiner, the combiner with a simulated judge of several strengths, and the oracle; the combiner fitted to few marked
questions, several draws each; accuracy over cost where members are asked one after another. Intervals are 95 %, paired
bootstrap over questions. `dev` is small, so figures cross-validated over `train` alone stand beside it.

The judge is simulated: its log-odds for two answers of which one is right are normal with standard deviation 1 and a
mean that makes it prefer the right one as often as named; with two right or two wrong answers the mean is 0. It is
measured as fitted: the combiner finds out from `train` what the judge is worth.

A combiner of few marked questions is held against the best member that all of `train` shows, not against the one that
few questions point to, which is often a worse one.

The prices are those that the data's README assumes, in dollars a million tokens, one answer a token.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

from mixfuse.contracts.files import write_json
from mixfuse.fusion.combiner.artefact import Combiner, grouped
from mixfuse.fusion.combiner.evidence import Comparison, Question, members_of, read_pool, subset
from mixfuse.fusion.combiner.fit import Options, combiner_of, fit_weights
from mixfuse.fusion.config import Agreement
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import Figures, marks, replay
from mixfuse.fusion.measure.statistics import Difference, difference, wilson

PRO, FLASH, CODER = "gemini-1.5-pro-002", "gemini-1.5-flash-002", "deepseek-coder-v2"
LLAMA_70B, QWEN, LLAMA_8B = "llama-3.1-70b-instruct", "qwen1.5-72b-chat", "llama-3.1-8b-instruct"
MATHSTRAL, MIXTRAL = "mathstral-7b", "mixtral-8x7b-instruct"
PRICES = {
    PRO: 5.0, LLAMA_70B: 0.9, QWEN: 0.9, MIXTRAL: 0.6, FLASH: 0.3, CODER: 0.28, MATHSTRAL: 0.25, LLAMA_8B: 0.2,
}  # fmt: skip
POOLS = {
    "all 8": list(PRICES),
    "the 4 strongest": [PRO, FLASH, CODER, LLAMA_70B],
    "3 of like strength": [FLASH, CODER, LLAMA_70B],
    "5 open models": [CODER, LLAMA_70B, QWEN, LLAMA_8B, MIXTRAL],
    "one strong, two weaker": [PRO, LLAMA_70B, QWEN],
    "3 small": [LLAMA_8B, MATHSTRAL, MIXTRAL],
    "4 cheapest": [FLASH, CODER, MATHSTRAL, LLAMA_8B],
    "a strong and a cheap": [PRO, FLASH],
}
GSM8K = "GSM8K, 6 models"
JUDGES = (0.55, 0.61, 0.66, 0.71, 0.8)
LABELS = (100, 300, 1000)
DRAWS = 5


@dataclass(frozen=True)
class Pool:
    """One pool's questions."""

    name: str
    train: Sequence[Question]
    dev: Sequence[Question]
    agreement: Agreement
    prices: dict[str, float]


def main() -> None:
    """Prints every pool's curve, then all pools side by side."""
    arguments = _arguments()
    rows = []
    for pool in pools(arguments.data, arguments.pools):
        start = time.process_time()
        rows.append(measure(pool))
        print_row(rows[-1])
        _progress(f"{pool.name}: {time.process_time() - start:.0f} CPU seconds")
    print_summary(rows)
    if arguments.out:
        write_json(arguments.out, rows)
    if arguments.json:
        print(json.dumps(rows))


def _progress(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def pools(data: Path, names: Sequence[str]) -> Iterator[Pool]:
    """The pools, by name."""
    train, agreement = read_pool([data / "mmlu_pro_pool" / "train.jsonl"])
    dev, _ = read_pool([data / "mmlu_pro_pool" / "dev.jsonl"])
    for name, members in POOLS.items():
        if name in names:
            prices = {member: PRICES[member] for member in members}
            yield Pool(name, subset(train, members), subset(dev, members), agreement, prices)
    if GSM8K in names:
        train, agreement = read_pool([data / "gsm8k_pool" / "train.jsonl"])
        dev, _ = read_pool([data / "gsm8k_pool" / "dev.jsonl"])
        yield Pool(GSM8K, train, dev, agreement, dict.fromkeys(members_of(train), 1.0))


def measure(pool: Pool) -> dict[str, Any]:
    """Every figure of one pool."""
    _progress(f"{pool.name}: fit")
    combiner = fit_combiner(pool.train, pool.agreement, pool.prices)
    figures = replay(combiner, pool.dev)
    judged = []
    for accuracy in JUDGES:
        _progress(f"{pool.name}: judge of {accuracy:g}")
        seen = without_curve(_weights(with_judge(pool.train, accuracy, seed=1), pool),
                             with_judge(pool.dev, accuracy, seed=2))  # fmt: skip
        judged.append(
            {"judge": accuracy, "weighed": seen.weighed, "difference": seen.difference.to_json(),
             "majority_difference": seen.majority_difference.to_json(), "fallback": seen.fallback}
        )  # fmt: skip
    labels = []
    for count in LABELS:
        if count < len(pool.train):
            _progress(f"{pool.name}: {count} marked questions")
            labels.append(_labels(pool, count, combiner.best_member))
    return {
        "pool": pool.name,
        "dev": figures.to_json(),
        "cross_validated": combiner.figures,
        "judges": judged,
        "labels": labels,
        "cost_at_best": cost_at(figures, combiner),
        "cross_validated_cost_at_best": _cheapest(combiner.figures["curve"], combiner.figures["best_member_accuracy"]),
    }


def without_curve(combiner: Combiner, questions: Sequence[Question]) -> Figures:
    """The figures of a combiner that asks everybody."""
    return replay(combiner.model_copy(update={"policies": []}), questions)


def with_judge(questions: Sequence[Question], accuracy: float, *, seed: int) -> list[Question]:
    """The questions with a simulated judge's comparisons of all classes of equal answers."""
    generator = random.Random(seed)
    shift = NormalDist().inv_cdf(accuracy)
    judged = []
    for question in questions:
        firsts = [places[0] for places in grouped(question.answers).values()]
        comparisons = []
        for first, second in combinations(firsts, 2):
            gap = bool(question.answers[first].right) - bool(question.answers[second].right)
            comparisons.append(Comparison("judge", first, second, generator.gauss(gap * shift, 1.0)))
        judged.append(replace(question, comparisons=tuple(comparisons)))
    return judged


def cost_at(figures: Figures, combiner: Combiner) -> dict[str, float] | None:
    """The policy that is the cheapest to reach the best member's accuracy, chosen on `train`, as it does on `dev`."""
    validated = combiner.figures["curve"], combiner.figures["best_member_accuracy"]
    cost = _cheapest(*validated)
    chosen = next((place for place, point in enumerate(validated[0]) if point["cost_ratio"] == cost), None)
    if cost is None or chosen is None:
        return None
    point = figures.curve[chosen]
    return {
        "target": point.target,
        "cost_ratio": point.cost_ratio or 0.0,
        "gain": point.accuracy - figures.best_member_accuracy,
    }


def _cheapest(curve: Sequence[dict[str, Any]], accuracy: float) -> float | None:
    return min(
        (point["cost_ratio"] for point in curve if point["accuracy"] >= accuracy and point["cost_ratio"]), default=None
    )


def _weights(questions: Sequence[Question], pool: Pool) -> Combiner:
    """A combiner without policies."""
    options = Options(pool.prices, {})
    return combiner_of(fit_weights(questions, options), questions, pool.agreement, options)


def _labels(pool: Pool, count: int, best: str) -> dict[str, Any]:
    """What a combiner fitted to few marked questions does, for several draws of them, beside the pool's best member."""
    truly = [mark for question in pool.dev for mark in _marks(question, best)]
    draws = []
    for seed in range(DRAWS):
        chosen = random.Random(seed).sample(list(pool.train), count)
        combiner = _weights(chosen, pool)
        weighed = marks(combiner, pool.dev).weighed
        gap = difference([question.group for question in pool.dev], weighed, truly)
        draws.append({**gap.to_json(), "fallback": bool(combiner.fallback), "best_member": combiner.best_member})
    return {"labels": count, "draws": draws, "mean": mean(draw["value"] for draw in draws)}


def _marks(question: Question, member: str) -> list[float]:
    """Of one answer, as every question of these pools has of each member."""
    return [float(bool(answer.right)) for answer in question.answers if answer.member == member]


def print_row(row: dict[str, Any]) -> None:
    """One pool's curve of accuracy over cost, as Markdown."""
    dev = row["dev"]
    print(f"\n**{row['pool']}**: {dev['n']} questions, best member {dev['best_member']}\n")
    print("| target | right | 95 % | cost / best member's | members asked | ECE |\n|" + " --- |" * 6)
    for point in dev["curve"]:
        low, high = wilson_of(point["accuracy"], dev["n"])
        print(
            f"| {point['target']:g} | {point['accuracy']:.3f} | [{low:.3f}, {high:.3f}] | {point['cost_ratio']:.2f} | "
            f"{point['asked']:.1f} | {point['ece']:.3f} |",
            flush=True,
        )


def wilson_of(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    right = round(share * n)
    return wilson([True] * right + [False] * (n - right))[1:]


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """All pools side by side, as Markdown."""
    print("\nOn dev, fitted on train; the last two columns are cross-validated on train:\n")
    _head("pool", "best", "majority", "log-odds", "weighed", "oracle", "weighed - best", "ECE (by chance)",
          "weighed - best, cv", "ECE, cv")  # fmt: skip
    for row in rows:
        dev, validated = row["dev"], row["cross_validated"]
        values = [f"{dev[key]:.3f}" for key in ("best_member_accuracy", "majority", "naive", "weighed", "oracle")]
        values += [_gap(dev["difference"]), f"{dev['ece']:.3f} ({dev['ece_chance']:.3f})"]
        _line(row["pool"], *values, _gap(validated["difference"]), f"{validated['ece']:.3f}")
    print(
        "\nThe least cost, over the best member's, at which asking one after another is right as often as it on train,"
    )
    print("cross-validated; and what the same target does on dev:\n")
    _head("pool", "cost", "target", "cost on dev", "right - best member on dev")
    for row in rows:
        seen = row["cost_at_best"]
        values = [f"{seen['target']:g}", f"{seen['cost_ratio']:.2f}", f"{seen['gain']:+.3f}"] if seen else ["-"] * 3
        _line(row["pool"], _number(row["cross_validated_cost_at_best"]), *values)
    print("\nWeighed - best member on dev, with a simulated judge of so much pair accuracy:\n")
    _head("pool", *(f"{accuracy:.2f}" for accuracy in JUDGES))
    for row in rows:
        _line(row["pool"], *(_gap(judged["difference"]) for judged in row["judges"]))
    print(
        "\nWeighed - the pool's best member on dev, by marked questions: mean and worst of the draws, how many returned"
    )
    print("one member's answers; in the last column, draws significantly below the best member:\n")
    _head("pool", *map(str, LABELS), "all", "significantly below")
    for row in rows:
        cells = [
            f"{count['mean']:+.3f}, {min(draw['value'] for draw in count['draws']):+.3f}, "
            f"{sum(draw['fallback'] for draw in count['draws'])} of {len(count['draws'])}"
            for count in row["labels"]
        ]
        cells += ["-"] * (len(LABELS) - len(cells))
        harmed = sum(draw["high"] < 0 for count in row["labels"] for draw in count["draws"])
        _line(row["pool"], *cells, f"{row['dev']['difference']['value']:+.3f}", str(harmed))


def _head(*names: str) -> None:
    _line(*names)
    _line(*["---"] * len(names))


def _line(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def _gap(value: dict[str, Any] | Difference) -> str:
    parts = value if isinstance(value, dict) else value.to_json()
    return f"{parts['value']:+.3f} [{parts['low']:+.3f}, {parts['high']:+.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu_pro_pool and gsm8k_pool")
    names = [*POOLS, GSM8K]
    parser.add_argument("--pools", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="write every figure here (JSON)")
    parser.add_argument("--json", action="store_true", help="print every figure as one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
