"""docs/fusing.md: its commands run, and its table names figures that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest
from combiner_pools import pool, write_pool

from mixfuse.cli.entry import main
from mixfuse.contracts.database import opened
from mixfuse.contracts.trace import Call, Trace
from mixfuse.fusion.config import TraceConfig
from mixfuse.fusion.measure.combiner_fit import cross_validate
from mixfuse.fusion.measure.combiner_page import sections
from mixfuse.fusion.measure.combiner_report import of_fit
from mixfuse.fusion.store.traces import TraceStore

PAGE = (Path(__file__).parents[2] / "docs" / "fusing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^mixfuse (.*)$", PAGE, re.MULTILINE)


def figures_of(header: str) -> list[str]:
    """The figures that the table with a header names."""
    table = PAGE[PAGE.index(f"| {header} |") :].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


async def test_the_commands_run_and_print_the_figures_that_the_page_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    accuracies = {"a": 0.7, "b": 0.65, "c": 0.65}
    write_pool(Path("pool.jsonl"), pool(150, accuracies))
    write_pool(Path("other.jsonl"), pool(150, accuracies, seed=1))
    await store(Path("runs/traces.sqlite3"), "a", "c")
    assert [command.split()[:2] for command in COMMANDS] == [
        ["combiner", "report"],
        ["combiner", "fit"],
        ["eval", "fusion"],
        ["traces", "export"],
        ["combiner", "report"],
    ]
    printed = []
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0, command
        printed.append(capsys.readouterr().out.splitlines()[-1])
    fitted, replayed = json.loads(printed[1]), json.loads(printed[2])
    assert len(figures_of("Figure")) == 14
    assert set(figures_of("Figure")) <= fitted.keys() & replayed.keys()
    assert len(figures_of("Figure of a report")) == 8
    assert set(figures_of("Figure of a report")) <= replayed.keys() - fitted.keys()
    written = json.loads(Path("runs/report/report.json").read_text())
    assert set(figures_of("Figure of a report")) <= written.keys()
    assert Path("runs/replay/report.html").exists()


async def store(place: Path, *members: str) -> None:
    """Writes the traces of one request that the first of some members answered right."""
    calls = [
        Call(stage="answer", member=member, model=member, candidate=number, text=f"The answer is ({'AB'[number]}).")
        for number, member in enumerate(members)
    ]
    trace = Trace(
        model="fusion/auto", mode="auto", messages=[{"role": "user", "content": "Which?"}], candidates=list(members),
        calls=calls, winner=0, answer="The answer is (A).", feedback=[{"correct": [0]}],
    )  # fmt: skip
    place.parent.mkdir(exist_ok=True)
    with opened(place) as database:
        traces = TraceStore(database, TraceConfig())
        await traces.add(trace)
        await traces.close()


def test_the_titles_that_the_page_explains_are_those_of_the_report() -> None:
    questions = pool(100, {"a": 0.7, "b": 0.7}, domains={"law": {}})
    report = of_fit(cross_validate(questions, "choice"), questions, lambda _: None)
    explained = re.findall(r"^- \*\*(.*?)\*\*", PAGE[PAGE.index("## Read the report") :], re.MULTILINE)
    assert [title.rstrip(".") for title in explained] == [section.title for section in sections(report)]


def test_the_row_of_the_page_is_read(tmp_path: Path) -> None:
    from mixfuse.fusion.combiner.evidence import read_pool

    example = re.search(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    assert example
    (tmp_path / "pool.jsonl").write_text(example[1] + "\n")
    (question,), _ = read_pool([tmp_path / "pool.jsonl"])
    assert [(answer.member, answer.right) for answer in question.answers] == [("a", True), ("b", False)]
