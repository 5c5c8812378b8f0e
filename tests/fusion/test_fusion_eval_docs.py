"""docs/judging.md, evaluation: its commands run, and its tables name what there is."""

import asyncio
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway, prefers

from mixfuse.cli.entry import main
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.judge_protocol import Calibration
from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.config import FusionConfig, Judge
from mixfuse.fusion.measure.comparisons import Comparison, Label
from mixfuse.fusion.measure.judge_report import WORDS, compared, report
from mixfuse.fusion.measure.marks import Views
from mixfuse.fusion.measure.questions import Verifier

PAGE = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^mixfuse (eval .*)$", PAGE, re.MULTILINE)


def first_cells(heading: str) -> list[list[str]]:
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


async def test_the_commands_of_the_page_run(
    upstream: FakeUpstream,
    start_gateway: StartGateway,
    config: Callable[..., FusionConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream.models["judge"].verdict = prefers("42")
    upstream.models["base"] = Script("it is 42", verdict=lambda _first, _second: 0.8)
    names = ("judge", "base", "alpha")
    members: list[Any] = [{"name": name, "base_url": upstream.base_url, "model": name} for name in names]
    gateway = await start_gateway(members)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXFUSE_URL", gateway.url)
    Path("fusion.yaml").write_text(yaml.safe_dump(config(members).model_dump(mode="json", exclude_defaults=True)))
    write_jsonl(Path("questions.jsonl"), [{"prompt": f"{n} + {42 - n}?", "reference": "42"} for n in range(4)])
    pair = {"response_a": {"text": "it is 42"}, "response_b": {"text": "it is 41"}, "label": "A"}
    write_jsonl(Path("pairs.jsonl"), [{"prompt": f"p{n}", **pair} for n in range(4)])
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        assert await asyncio.to_thread(main, shlex.split(command)) == 0, command
    report = json.loads(Path("runs/judged/report.json").read_text())
    assert report["against"]["untrained"]["difference"]["both_orders_correct"]["value"] == 1
    assert json.loads(Path("runs/fused/report.json").read_text())["best_member"] == "base"
    for folder in ("judged", "fused"):
        assert {"report.html", "report.md", "cache.sqlite3"} <= {file.name for file in Path("runs", folder).iterdir()}


def test_the_judges_config_of_the_page_is_one() -> None:
    (text,) = re.findall(r"^```yaml\n(kind: .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert validate(yaml.safe_load(text), Judge, source="the page").kind == "reward"


def test_every_verifier_is_on_the_page() -> None:
    named = [cells[0].strip("`") for cells in first_cells("`--verifier`")]
    assert named == [*get_args(Verifier), "reasoning-gym"]


def test_the_page_explains_every_row_that_is_printed() -> None:
    labels: list[Label] = ["first", "second", "tie", "first"]
    pairs = [
        Comparison(f"p{n}", f"{n} " * (n + 1), "wrong", label, (f"m{n % 2}", "m2"), "a.jsonl")
        for n, label in enumerate(labels)
    ]
    views = [Views(0.9, 0.2), Views(0.6, 0.5), Views(0.5, 0.5), Views(None, None)]
    calibration = Calibration(temperature=2.0, tie_margin=0.1)
    own = report(pairs, views, failed_calls={"timeout": 1}, calibration=calibration)
    table = compared(pairs, own, {"other": own}).table()
    rows = [str(cell) for cell in table.columns[0].cells]
    explained = re.findall(r"\*\*([^*]+)\*\*:", PAGE)
    known = {words for one in explained for words in (one, *one.split(", "))}
    for row in rows:
        bare = row.removeprefix("minus ").removeprefix("other, ").removeprefix("a coin, ")
        assert {bare, bare.partition(":")[0]} & known, (row, known)
    assert set(WORDS.values()) < set(rows)
    assert "minus other, right in both orders" in rows
