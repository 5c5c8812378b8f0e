"""The demo's figures, put together from what its steps left: the content of results.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mixfuse.contracts.files import read_jsonl
from mixfuse.contracts.tasks import Task
from mixfuse.fusion.measure import statistics

CONFIG = Path("configs/tiny/fusion.yaml")


@dataclass(frozen=True)
class Measured:
    """What the steps measured.

    Attributes:
        heldout: The held-out tasks.
        answers: The file of the members' greedy answers to them.
        untrained: `mixfuse eval judge --json` of the base.
        trained: The same of the trained judge.
        fusion: `mixfuse eval fusion --json` of best_of and auto, at the running server.
        auto: `mixfuse eval fusion --pool --json`: auto replayed on all held-out answers.
        swap: Requests during the hot swap, and those that failed.
        parity: By role: the worst difference of a log-probability between vLLM and PEFT, in nats.
    """

    heldout: Sequence[Task]
    answers: Path
    untrained: dict[str, Any]
    trained: dict[str, Any]
    fusion: dict[str, Any]
    auto: dict[str, Any]
    swap: dict[str, Any]
    parity: dict[str, float]


def results(measured: Measured) -> dict[str, Any]:
    """The content of results.json, less what the demo took."""
    strict, lenient = _marks(measured.heldout, measured.answers)
    return {
        "base_accuracy": share(strict["base"]),
        "base_accuracy_interval": wilson(strict["base"]),
        "base_accuracy_lenient": share(lenient["base"]),
        "domain_accuracy": share(strict["domain"]),
        "domain_accuracy_interval": wilson(strict["domain"]),
        "domain_accuracy_lenient": share(lenient["domain"]),
        "heldout_tasks": len(measured.heldout),
        "judge": _judge(measured.untrained, measured.trained),
        "fusion": _fusion(measured.fusion) | _auto(measured.auto),
        "swap": measured.swap,
        "parity": measured.parity,
    }


def _marks(tasks: Sequence[Task], answers: Path) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """By member: whether each answer is right, and whether it is with the answer taken out of its sentence."""
    by_id = {task.id: task for task in tasks}
    strict: dict[str, list[bool]] = {}
    lenient: dict[str, list[bool]] = {}
    for row in read_jsonl(answers):
        for response in row["responses"]:
            strict.setdefault(response["model"], []).append(response["correct"])
            lenient.setdefault(response["model"], []).append(by_id[row["id"]].verify_lenient(response["text"]))
    return strict, lenient


def _judge(untrained: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    both = trained["both_orders_correct"]
    return {
        "untrained_both_orders": untrained["both_orders_correct"]["value"],
        "untrained_consistency": untrained["consistency"]["value"],
        "trained_both_orders": both["value"],
        "trained_both_orders_interval": [both["low"], both["high"]],
        "consistency": trained["consistency"]["value"],
        "first_order": trained["first_order"]["value"],
        "random": trained["baselines"]["random"]["both_orders_correct"],
        "baselines": trained["baselines"],
        "n": trained["n"],
    }


def _fusion(fused: dict[str, Any]) -> dict[str, Any]:
    best_single, n = fused["best_member"], fused["tasks"]
    best_of = fused["modes"]["best_of"]["accuracy"]["value"]
    return {
        "best_of_accuracy": best_of,
        "best_of_interval": wilson([place < round(best_of * n) for place in range(n)]),
        "best_single_accuracy": fused["members"][best_single]["accuracy"]["value"],
        "best_single": best_single,
        "self_fusion_accuracy": fused["self_fusion"]["best_of"]["accuracy"]["value"],
        "oracle_accuracy": fused["baselines"]["oracle"]["accuracy"]["value"],
        "gap_closed": fused["gap_closed"]["best_of"],
        "auto_live_accuracy": fused["modes"]["auto"]["accuracy"]["value"],
        "majority_accuracy": fused["baselines"]["majority"]["accuracy"]["value"],
        "verdict": fused["verdict"]["words"],
        "n": n,
    }


def _auto(replayed: dict[str, Any]) -> dict[str, Any]:
    """The figures of auto at the target that the demo's config names, and what stands beside them."""
    target = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["modes"]["target"]
    point = next(point for point in replayed["curve"] if point["target"] >= target)
    return {
        "auto_accuracy": point["accuracy"],
        "auto_cost_ratio": point["cost_ratio"],
        "auto_ece": point["ece"],
        "auto_n": replayed["n"],
        "auto_best_member": replayed["best_member"],
        "auto_best_member_accuracy": replayed["best_member_accuracy"],
        "auto_majority_accuracy": replayed["majority"],
        "auto_weighed_accuracy": replayed["weighed"],
        "auto_oracle_accuracy": replayed["oracle"],
        "auto_difference": replayed["difference"],
        "auto_fallback": replayed["fallback"],
    }


def share(marks: Sequence[bool]) -> float:
    """The share of marks that are true; 0 of none."""
    return sum(marks) / len(marks) if marks else 0.0


def wilson(marks: Sequence[bool]) -> list[float]:
    """Wilson's 95 % interval of a share, as [low, high]; [0, 1] of no marks."""
    if not marks:
        return [0.0, 1.0]
    estimate = statistics.wilson(marks)
    return [estimate.low, estimate.high]
