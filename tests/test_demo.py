"""The parts of scripts/demo that are worth a test of their own: what it measures of itself, and what it reports.

CI runs the demo itself, on the tiny base.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from demo_app.report import claims, summary
from demo_app.results import wilson
from demo_app.steps import FULL, MEMBERS, QUICK, WORDS, Demo, with_combiner
from demo_app.usage import Usage

from mixfuse.contracts.strict_yaml import load
from mixfuse.fusion.config import FusionConfig

BURN_AND_HOLD = """
import sys, time
held = bytearray(b"x" * 300_000_000)
while time.process_time() < 0.5:
    pass
print("ready", flush=True)
sys.stdin.read()
"""


def test_usage_counts_the_cpu_time_of_a_child_that_lives_and_of_one_that_has_ended(tmp_path: Path) -> None:
    usage = Usage(tmp_path / "usage.json")
    with usage.step("burn"):
        for ends in (True, False):
            child = subprocess.Popen([sys.executable, "-c", BURN_AND_HOLD], stdin=-1, stdout=-1, text=True)
            assert child.stdout
            assert child.stdin
            child.stdout.readline()
            if ends:
                child.communicate()
    try:
        found = usage.to_json()
        assert found["cpu_minutes_by_step"]["burn"] * 60 > 0.95
    finally:
        child.communicate()


def test_usage_sees_the_memory_of_children(tmp_path: Path) -> None:
    from demo_app.usage import memory_bytes

    before = memory_bytes()
    child = subprocess.Popen([sys.executable, "-c", BURN_AND_HOLD], stdin=-1, stdout=-1, text=True)
    assert child.stdout
    child.stdout.readline()
    try:
        assert memory_bytes() - before > 280_000_000
    finally:
        child.communicate()


def test_an_interrupted_demo_adds_to_what_it_has_taken(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    try:
        with Usage(path).step("sft"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    first = Usage(path)
    assert not first.finished("sft")
    taken = first.wall_s(["sft"])
    with first.step("sft"):
        pass
    second = Usage(path)
    assert second.finished("sft")
    assert second.wall_s(["sft"]) > taken > 0


def test_every_step_has_an_expected_time() -> None:
    assert list(FULL.minutes) == list(QUICK.minutes) == list(WORDS)


def test_the_pool_is_served_without_a_combiner_and_then_with_the_one_that_is_fitted(tmp_path: Path) -> None:
    text = Demo(QUICK).here("fusion.yaml")
    for name, content, expected in (
        ("before", text, None),
        ("after", with_combiner(text), QUICK.out / "combiner.json"),
    ):
        (tmp_path / f"{name}.yaml").write_text(content)
        config = load(tmp_path / f"{name}.yaml", FusionConfig)
        assert config.combiner == expected
        assert {member.name for member in config.members} == set(MEMBERS)


def test_wilson() -> None:
    """The score interval solves |p - k/n| = z sqrt(p (1 - p) / n) for p."""
    low, high = wilson([True] * 7 + [False] * 13)
    for bound in (low, high):
        assert abs(abs(bound - 0.35) - 1.959964 * (bound * (1 - bound) / 20) ** 0.5) < 1e-6
    assert low < 0.35 < high


def results(**changes: Any) -> dict[str, Any]:
    """A demo's figures in which every claim holds."""
    found: dict[str, Any] = {
        "base_accuracy": 0.0, "base_accuracy_interval": [0.0, 0.04], "base_accuracy_lenient": 0.1,
        "domain_accuracy": 0.5, "domain_accuracy_interval": [0.4, 0.6], "domain_accuracy_lenient": 0.5,
        "judge": {
            "untrained_both_orders": 0.1, "trained_both_orders": 0.6, "trained_both_orders_interval": [0.5, 0.7],
            "random": 0.25, "baselines": {"shorter": {"both_orders_correct": {"value": 0.5}}},
        },
        "fusion": {
            "best_of_accuracy": 0.6, "best_of_interval": [0.4, 0.8], "best_single": "domain",
            "best_single_accuracy": 0.5, "auto_accuracy": 0.6, "auto_cost_ratio": 1.2, "auto_ece": 0.05,
            "auto_best_member": "domain", "auto_best_member_accuracy": 0.5,
        },
        "swap": {"requests_during": 20, "failed": 0},
        "parity": {"domain": 5e-5, "judge": 6e-5},
        "usage": {"cpu_minutes": 24.4, "wall_minutes": 15.2, "peak_memory_gb": 9.1},
    }  # fmt: skip
    return found | changes


def test_the_last_screen_says_what_was_not_shown() -> None:
    text = summary(Path("runs/demo"), results(), quick=False)
    assert "`mixfuse ui --runs runs/demo` shows the runs and reports at http://127.0.0.1:8081/ui" in text
    assert "**Not shown**\n\n- nothing: all of it held" in text
    assert "24 CPU minutes in 15 minutes, at most 9.1 GB" in text
    assert all(claim.holds for claim in claims(results()))
    lost = results(swap={"requests_during": 20, "failed": 1}, base_accuracy_interval=[0.0, 0.4])
    failing = summary(Path("runs/demo"), lost, quick=False).split("**Not shown**")[1]
    assert "the hot swap lost no request (1 of 20 failed)" in failing
    assert "by more than the intervals" in failing
