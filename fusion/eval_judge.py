"""How good a judge is: both orders of labelled pairs, beside rules that look at no content.

A judge that favours a position is right in both orders on few pairs, one that favours length is no better
than `longer`, and one that knows an author's style no better than `strongest_member`; the report shows each.
"""

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusion.comparisons import Comparison, load
from fusion.judge import verdict
from fusion.pool import all_or_raise, fan_out, http_client
from fusion.upstream import CallError, Client, Endpoint, Ledger, Purpose
from mixfuse.errors import MixfuseError
from mixfuse.judge_protocol import combine

__all__ = ["Comparison", "JudgeReport", "evaluate", "load"]

RESAMPLES = 1000
SEED = 0


class Figure(NamedTuple):
    """A share with its 95 % interval: bootstrap over prompts, percentiles."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As `{"value", "low", "high"}`."""
        return self._asdict()

    def __str__(self) -> str:
        return f"{self.value:.3f}  [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class JudgeReport:
    """What an evaluation came to; shares are of the pairs that people did not call a tie.

    Attributes:
        n: Pairs judged.
        prompts: Prompts they are of.
        human_ties: Pairs left out because people called them a tie.
        both_orders_correct: Right whichever answer was shown first.
        first_order: Right in the first order; a verdict of exactly ½ or none counts as wrong.
        order_averaged: The mean over both orders is on the right side; exactly ½ counts half.
        consistency: Both orders name the same answer.
        parse_failures: Verdicts, of 2n, that could not be read; those of failed calls among them.
        failed_calls: Calls that failed, by type.
        baselines: The same pairs by rules that read nothing; each names its measure.
    """

    n: int
    prompts: int
    human_ties: int
    both_orders_correct: Figure
    first_order: Figure
    order_averaged: Figure
    consistency: Figure
    parse_failures: int
    failed_calls: dict[str, int] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON object; every accuracy is `{"value", "low", "high"}`."""
        return {
            "n": self.n,
            "prompts": self.prompts,
            "human_ties": self.human_ties,
            "both_orders_correct": self.both_orders_correct.to_json(),
            "first_order": self.first_order.to_json(),
            "order_averaged": self.order_averaged.to_json(),
            "consistency": self.consistency.to_json(),
            "parse_failures": self.parse_failures,
            "failed_calls": self.failed_calls,
            "baselines": self.baselines,
        }

    def table(self) -> Table:
        """The report for the terminal."""
        title = f"{self.n} pairs of {self.prompts} prompts, {self.human_ties} human ties left out"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        table.add_column("share, 95 % interval over prompts")
        table.add_row("right in both orders", str(self.both_orders_correct))
        table.add_row("right in the first order", str(self.first_order))
        table.add_row("right, orders averaged", str(self.order_averaged))
        table.add_row("consistent", str(self.consistency))
        table.add_row("verdicts not read", f"{self.parse_failures} of {2 * self.n}")
        for kind, count in self.failed_calls.items():
            table.add_row(f"calls failed: {kind}", str(count))
        table.add_section()
        random_ = self.baselines["random"]
        table.add_row("random, both orders", f"{random_['both_orders_correct']:.3f}")
        table.add_row("random, first order", f"{random_['first_order']:.3f}")
        for name in ("longer", "shorter", "strongest_member"):
            if name in self.baselines:
                row = self.baselines[name]
                note = f"  ({row['member']}; chosen on these very pairs)" if "member" in row else ""
                table.add_row(name.replace("_", " "), f"{Figure(**row['both_orders_correct'])}{note}")
        return table


class Views(NamedTuple):
    """P(the answer shown first is better), each way round; None where it could not be read."""

    forward: float | None
    backward: float | None


async def evaluate(
    judge_endpoint: Endpoint, rows: Sequence[Comparison], *, concurrency: int = 8, progress: bool = True
) -> JudgeReport:
    """Has a judge compare every pair in both orders.

    Args:
        judge_endpoint: The judge.
        rows: From `load`; human ties are counted, not judged.
        concurrency: Calls under way at once.
        progress: Show a bar on stderr.

    Raises:
        MixfuseError: There is nothing to judge, the judge cannot be reached, or all its calls failed.
    """
    judged = [row for row in rows if row.label != "tie"]
    if not judged:
        raise MixfuseError("no pair is left to judge: none has a label other than a tie")
    free = asyncio.Semaphore(concurrency)
    failures: list[CallError] = []
    purpose = Purpose("verdict", "judge")

    async def one(client: Client, prompt: str, first: str, second: str) -> float | None:
        async with free:
            try:
                return await verdict(client, judge_endpoint, prompt, first, second, purpose=purpose, ledger=Ledger())
            except CallError as error:
                if error.kind == "unreachable":  # nor will the next thousand calls reach it
                    raise
                failures.append(error)
                return None
            finally:
                bar.advance(shown)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        shown = bar.add_task("verdicts", total=2 * len(judged))
        async with http_client() as client:
            orders = [
                one(client, row.prompt, first, second)
                for row in judged
                for first, second in ((row.first, row.second), (row.second, row.first))
            ]
            read = all_or_raise(await fan_out(orders, quorum=len(orders)))
    if len(failures) == 2 * len(judged):
        raise MixfuseError(f"every call to the judge failed, the last: {failures[-1]}", kind="judge_failed")
    return report(
        judged,
        [Views(*both) for both in zip(read[::2], read[1::2], strict=True)],
        human_ties=len(rows) - len(judged),
        failed_calls=Counter(failure.kind for failure in failures),
    )


def report(
    rows: Sequence[Comparison],
    views: Sequence[Views],
    *,
    human_ties: int = 0,
    failed_calls: Mapping[str, int] | None = None,
) -> JudgeReport:
    """Works out the figures.

    Args:
        rows: What was judged, without human ties.
        views: The judge's, in the same order.
        human_ties: How many pairs were left out.
        failed_calls: Calls that failed, by type.
    """
    outcomes = [combine(view.forward, view.backward) for view in views]
    share = _bootstrap([row.prompt for row in rows])
    pairs = list(zip(rows, views, outcomes, strict=True))
    baselines: dict[str, dict[str, Any]] = {"random": {"both_orders_correct": 0.25, "first_order": 0.5}}
    rules = {
        "longer": share([_credit(len(row.first) - len(row.second), row) for row in rows]),
        "shorter": share([_credit(len(row.second) - len(row.first), row) for row in rows]),
    }
    for name, figure in rules.items():
        baselines[name] = _rule(figure)
    if all(row.models for row in rows):
        strength = _win_rates(rows)
        figure = share([_credit(strength[a] - strength[b], row) for row in rows for a, b in [row.models or ("", "")]])
        baselines["strongest_member"] = {
            **_rule(figure),
            "member": max(sorted(strength), key=lambda name: strength[name]),
            "in_sample": True,
        }
    return JudgeReport(
        n=len(rows),
        prompts=len({row.prompt for row in rows}),
        human_ties=human_ties,
        both_orders_correct=share([float(outcome.winner == row.label) for row, _, outcome in pairs]),
        first_order=share([float(_first_says(view.forward) == row.label) for row, view, _ in pairs]),
        order_averaged=share([_credit(outcome.score - 0.5, row) for row, _, outcome in pairs]),
        consistency=share([float(outcome.consistent) for outcome in outcomes]),
        parse_failures=sum(outcome.parse_failures for outcome in outcomes),
        failed_calls=dict(failed_calls or {}),
        baselines=baselines,
    )


def _rule(figure: Figure) -> dict[str, Any]:
    """A rule that looks at no position says the same in both orders."""
    return {"both_orders_correct": figure.to_json(), "first_order": figure.to_json()}


def _first_says(forward: float | None) -> str:
    if forward is None or forward == 0.5:
        return "nothing"
    return "first" if forward > 0.5 else "second"


def _credit(leaning: float, row: Comparison) -> float:
    """1 where a leaning to the first answer (negative: the second) is right, 0 where wrong, ½ for none."""
    if math.isclose(leaning, 0.0, abs_tol=1e-9):
        return 0.5
    return float((leaning > 0) == (row.label == "first"))


def _win_rates(rows: Sequence[Comparison]) -> dict[str, float]:
    won: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.models:
            won[row.models[0]].append(row.label == "first")
            won[row.models[1]].append(row.label == "second")
    return {name: sum(results) / len(results) for name, results in won.items()}


def _bootstrap(prompts: Sequence[str]) -> Callable[[Sequence[float]], Figure]:
    """Returns what gives a mean its interval; whole prompts are drawn: their pairs are not independent."""
    clusters: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        clusters[prompt].append(index)
    members = list(clusters.values())
    generator = random.Random(SEED)  # noqa: S311 - statistics, not secrets
    draws = [generator.choices(range(len(members)), k=len(members)) for _ in range(RESAMPLES)]
    sizes = [len(indices) for indices in members]
    drawn_sizes = [sum(sizes[cluster] for cluster in draw) for draw in draws]

    def share(values: Sequence[float]) -> Figure:
        sums = [sum(values[index] for index in indices) for indices in members]
        means = sorted(
            sum(sums[cluster] for cluster in draw) / size for draw, size in zip(draws, drawn_sizes, strict=True)
        )
        low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
        return Figure(sum(values) / len(values), low, high)

    return share
