"""`mixfuse report bundle`: one HTML file, which a real browser opens without a network and in which nothing runs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from browsing import Watched, served
from fake_upstream import Script
from fusion_harness import prefers
from test_ui_runs import ATTACK, train_row, write_run

from mixfuse.cli.entry import main

LOADED = re.compile(r'(?:src|href)="(?!#|data:image/)')


def bundle(out: Path, *arguments: str) -> None:
    """Runs the command in a process of its own: the browser's loop is in this one."""
    command = [sys.executable, "-m", "mixfuse", "report", "bundle", "--out", str(out), *arguments]
    subprocess.run(command, check=True)
    page = out.read_text()
    assert not LOADED.search(page), "it loads nothing"
    assert "<script" not in page.lower()


def test_a_run_with_its_baseline(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    run = write_run(tmp_path / "run", [train_row(1, 4.0), train_row(2, 2.0)], {"role": ATTACK, "lora": {"r": 16}})
    base = write_run(tmp_path / "elsewhere" / "base", [train_row(1, 5.0), train_row(2, 4.5)], {"lora": {"r": 8}})
    (run / "experts.json").write_text(json.dumps({"gate_share": [[0.25, 0.75]], "chosen": [[1]]}))
    out = tmp_path / "run.html"
    bundle(out, str(run), "--with", str(base))
    page = tab(viewport={"width": 360, "height": 800}, offline=True).page
    page.goto(out.as_uri())
    assert page.get_by_role("img", name="Loss over steps 1 to 2. training: from 4 to 2").is_visible()
    assert page.locator("polyline.dashed").count() >= 1
    assert ATTACK in page.locator("main").inner_text()
    colour = page.locator("svg.heat path").first.evaluate("path => getComputedStyle(path).fillOpacity")
    assert float(colour) < 0.5, "its style sheet is in force"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_report_with_its_pictures(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text(f"# Which is right?\n\n{ATTACK}\n\n![A curve](c.svg)\n\n![Lost](gone.svg)\n")
    (report / "c.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20" onload="alert(1)">'
        "<script>alert(2)</script></svg>"
    )
    out = tmp_path / "report.html"
    bundle(out, str(report))
    page = tab(offline=True).page
    page.goto(out.as_uri())
    assert page.get_by_role("img", name="A curve").evaluate("image => image.complete && image.naturalWidth") == 40
    assert page.get_by_text("Lost").is_visible()
    assert ATTACK in page.locator("main").inner_text()


def test_a_trace(tmp_path: Path, tab: Callable[..., Watched]) -> None:
    models = {"alpha": Script(ATTACK), "beta": Script("another answer"), "judge": Script(verdict=prefers("alpha"))}
    with served(tmp_path, models, members=["alpha", "beta"]) as running:
        body = {"model": "fusion/best-of", "messages": [{"role": "user", "content": f"what? {ATTACK}"}]}
        answered = httpx.post(f"{running.url}/v1/chat/completions", json=body)
        assert answered.status_code == 200, answered.text
        (trace,) = httpx.get(f"{running.url}/v1/traces").json()["data"]
    out = tmp_path / "trace.html"
    bundle(out, "--trace", trace["id"], "--db", str(tmp_path / "traces.sqlite3"))
    page = tab(offline=True).page
    page.goto(out.as_uri())
    text = page.locator("main").inner_text()
    assert f"what? {ATTACK}" in text
    assert "another answer" in text
    assert page.get_by_role("img", name="calls in").is_visible(), "the timeline"
    assert page.locator("main img, main script").count() == 0


def test_what_cannot_be_bundled_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), [train_row(1, 1.0)], {})
    Path("report").mkdir()
    Path("report/report.md").write_text("# A report\n")
    Path("empty").mkdir()
    for arguments, said in (
        ([], "name what goes into the file"),
        (["run", "--trace", "x"], "name what goes into the file"),
        (["nothing"], "there is no such folder"),
        (["empty"], "no run or report 'empty'"),
        (["report", "--with", "run"], "leave --with out"),
        (["run", "--with", "report"], "name a run"),
        (["run", "--with", "empty"], "no run or report 'empty'"),
        (["--trace", "x", "--db", "none.sqlite3"], "there is no database none.sqlite3"),
    ):
        assert main(["report", "bundle", "--out", "out.html", *arguments]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert len(printed.splitlines()) == 1
    assert not Path("out.html").exists()
