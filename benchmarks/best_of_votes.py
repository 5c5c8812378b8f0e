"""What votes add to a judge: `best_of` on recorded answers of real models, with simulated judges of several strengths.

    python benchmarks/best_of_votes.py --data ../shared/data [--json]

Three ways to choose among the same answers of the same questions: the judge alone (classes of equal answers, ranked by
pairs won, as `best_of` did before votes counted), the majority vote, and votes and judge together (`best_of`: the same
`knock_out_pairs`, `survivors` and `ranking` as the gateway's).

The judge is simulated, everything else is recorded. Its order-averaged log-odds on a pair are d²·t + d·√2·e nats, with
e a standard normal, drawn once a pair of distinct answers; t is 1 where only the first is right, -1 where only the
second is, and 0 where both or neither are. d = √2·Φ⁻¹(accuracy): this share of the pairs of a right and a wrong
answer leans the right way, and the log-odds are honest (calibrated). A *boasting* judge says five times as much and has
no calibration: the gateway then counts at most one vote of it. Real judges err on the same questions as the members do,
which this does not show.

Intervals: paired bootstrap over questions, 95 %. Of tied classes every way takes the first in the pool's order; the
column "majority, best" settles them for the member that is right most often, which nobody knows without marked answers.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from mixfuse.contracts.judge_protocol import combine, probability
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.answering.agreement import FIRST
from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.answering.pairwise_judge import FINALISTS, SUREST, VOTE, knock_out_pairs, ranking, survivors
from mixfuse.fusion.combiner.artefact import grouped
from mixfuse.fusion.combiner.evidence import Question, read_pool, subset
from mixfuse.fusion.config import Member
from mixfuse.fusion.measure.statistics import difference

STRENGTHS = (0.55, 0.61, 0.66, 0.71, 0.80)
BOAST = 5.0
PRO, FLASH, CODER, LLAMA70 = "gemini-1.5-pro-002", "gemini-1.5-flash-002", "deepseek-coder-v2", "llama-3.1-70b-instruct"
QWEN, MIXTRAL, LLAMA8, MATH = "qwen1.5-72b-chat", "mixtral-8x7b-instruct", "llama-3.1-8b-instruct", "mathstral-7b"
POOLS: dict[str, tuple[str, ...] | None] = {
    "all 8": None,
    "the 4 strongest": (PRO, FLASH, CODER, LLAMA70),
    "3 of like strength": (FLASH, CODER, LLAMA70),
    "5 open models": (LLAMA70, QWEN, MIXTRAL, LLAMA8, MATH),
    "one strong, two weaker": (PRO, QWEN, LLAMA8),
    "3 small": (LLAMA8, MATH, MIXTRAL),
}
_MEMBER = Member(name="m", role="r")
Judged = Callable[[int, int], float]
"""Two answers' places → the judge's log-odds that the first is better."""


@dataclass(frozen=True)
class Row:
    """What each way is right about, on one pool with one judge: 1 or 0 a question."""

    pool: str
    judge: str
    alone: list[float]
    majority: list[float]
    majority_best: list[float]
    fused: list[float]


def main() -> None:
    """Prints the table; exits with 1 where votes and judge are significantly below the majority."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with mmlu_pro_pool/ and gsm8k_pool/")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = []
    for name, questions in _pools(arguments.data):
        for strength, boasting in [*((value, False) for value in STRENGTHS), (0.61, True), (0.80, True)]:
            results.append(_summary(_replay(name, questions, strength, boasting=boasting)))
            if not arguments.json:
                _print(results[-1], header=len(results) == 1)
    below = [row for row in results if row["fused_minus_majority"]["high"] < 0]
    if arguments.json:
        print(json.dumps({"rows": results, "significantly_below_majority": len(below)}))
    else:
        lower = [row for row in results if row["fused_minus_majority"]["value"] < 0]
        print(f"\nvotes and judge below the majority: {len(lower)} of {len(results)}, significantly {len(below)}")
    raise SystemExit(bool(below))


def _pools(data: Path) -> list[tuple[str, list[Question]]]:
    def both(folder: str) -> list[Question]:  # nothing is fitted here, so both splits count
        return read_pool([data / folder / f"{split}.jsonl" for split in ("train", "dev")])[0]

    mmlu = both("mmlu_pro_pool")
    pools = [(name, subset(mmlu, members) if members else mmlu) for name, members in POOLS.items()]
    return [*pools, ("GSM8K, 6", both("gsm8k_pool"))]


def _replay(pool: str, questions: Sequence[Question], strength: float, *, boasting: bool) -> Row:
    generator = np.random.default_rng(round(strength * 100))
    d = math.sqrt(2) * NormalDist().inv_cdf(strength)
    accuracy: dict[str, list[bool]] = {}
    for question in questions:
        for answer in question.answers:
            accuracy.setdefault(answer.member, []).append(bool(answer.right))
    merit = {name: sum(marks) / len(marks) for name, marks in accuracy.items()}
    row = Row(pool, f"{strength:.2f}{', boasting' if boasting else ''}", [], [], [], [])
    for question in questions:
        classes = list(grouped(question.answers).values())
        right = [float(bool(question.answers[places[0]].right)) for places in classes]
        noise = generator.standard_normal((len(classes), len(classes)))

        def judged(one: int, other: int, right: list[float] = right, noise: Any = noise) -> float:
            says = d * d * (right[one] - right[other]) + d * math.sqrt(2) * float(noise[one, other])
            return says * (BOAST if boasting else 1.0)

        votes: dict[int, float] = {number: len(places) for number, places in enumerate(classes)}
        row.alone.append(right[_best_of(len(classes), judged, {}, SUREST)])
        weighed = {number: count + (FIRST if number == 0 else 0) for number, count in votes.items()}
        row.fused.append(right[_best_of(len(classes), judged, weighed, VOTE if boasting else SUREST)])
        row.majority.append(right[max(votes, key=lambda number: (votes[number], -number))])
        best = {number: max(merit[question.answers[place].member] for place in classes[number]) for number in votes}
        row.majority_best.append(right[max(votes, key=lambda number: (votes[number], best[number]))])
    return row


def _best_of(count: int, judged: Judged, votes: dict[int, float], limit: float) -> int:
    """The class that the gateway's own functions choose; without votes, as `best_of` chose before."""

    def verdict(first: Candidate, second: Candidate) -> Verdict:
        p = probability(judged(first.index, second.index))
        return Verdict(first=first.index, second=second.index, **combine(p, 1 - p)._asdict())

    rivals = [Candidate(index, _MEMBER, "", "stop") for index in range(count)]
    while len(rivals) > FINALISTS:
        rivals = survivors(rivals, [verdict(*pair) for pair in knock_out_pairs(rivals)], votes, limit)
    return ranking([verdict(*pair) for pair in itertools.combinations(rivals, 2)], rivals, votes, limit)[0].index


def _summary(row: Row) -> dict[str, Any]:
    keys = range(len(row.fused))
    return {
        "pool": row.pool,
        "judge": row.judge,
        "n": len(row.fused),
        **{name: sum(getattr(row, name)) / len(row.fused) for name in ("alone", "majority", "majority_best", "fused")},
        "fused_minus_alone": difference(keys, row.fused, row.alone).to_json(),
        "fused_minus_majority": difference(keys, row.fused, row.majority).to_json(),
        "alone_minus_majority": difference(keys, row.alone, row.majority).to_json(),
        "fused_minus_majority_best": difference(keys, row.fused, row.majority_best).to_json(),
    }


def _print(row: dict[str, Any], *, header: bool) -> None:
    if header:
        print("| pool | judge | judge alone | majority | majority, best | votes + judge | votes + judge - majority |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    gap = row["fused_minus_majority"]
    cells = [f"{row[name]:.3f}" for name in ("alone", "majority", "majority_best", "fused")]
    print(
        f"| {row['pool']} | {row['judge']} | {' | '.join(cells)} | "
        f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] |",
        flush=True,
    )


if __name__ == "__main__":
    main()
