"""The page Runs: live runs, a baseline, reports and pictures; and a folder in which nothing can be trusted."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Served, Watched, served
from fake_upstream import Script
from playwright.sync_api import expect

from mixfuse.app.run_charts import CHARTS, charts
from mixfuse.app.runs import RunsFolder
from mixfuse.contracts.database import opened
from mixfuse.fusion.http import keys
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.train.stages.training_metrics import PLOTS

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def train_row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A row as `train/stages/training_metrics.py` writes it."""
    measured = {"learning_rate": 0.001 / step, "grad_norm": 1.0, "tokens_per_second": 40.5 + step, "aux_loss": 2.0}
    return {"step": step, "time": 1000.0 + 10 * step, "loss": loss, **measured, "expert_load_max": 1.5, **more}


def judge_row(step: int, loss: float, consistency: float) -> dict[str, Any]:
    fitted = {"eval_temperature": 1.3, "eval_tie_margin": 0.0, "eval_calibration_error_before": 0.4}
    shares = {"eval_both_orders_correct": consistency / 2, "eval_consistency": consistency, "eval_order_averaged": 1.0}
    return {
        "step": step,
        "time": 1001.0 + 10 * step,
        "eval_loss": loss,
        **shares,
        **fitted,
        "eval_calibration_error": 0.1,
    }


def write_run(folder: Path, rows: list[dict[str, Any]], recipe: dict[str, Any], *, done: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        metrics = {"steps": rows[-1]["step"], "last_loss": 0.5}
        (folder / "run.json").write_text(json.dumps({"stage": "sft", "recipe": recipe, "metrics": metrics}))
    return folder


def age(folder: Path, seconds: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder") / "runs"
    recipe = {"role": "domain", "optimizer": {"steps": 3, "learning_rate": 0.001}, "lora": {"r": 16}}
    write_run(root / "sft", [train_row(1, 4.0), train_row(2, 2.0), train_row(3, 1.25)], recipe)
    other = recipe | {"lora": {"r": 8}, "note": ATTACK}
    write_run(root / "deep" / "smaller", [train_row(1, 4.5), train_row(2, 3.5), train_row(3, 3.25)], other)
    rows = [judge_row(0, 0.7, 0.0), train_row(1, 0.69), judge_row(2, 0.5, 0.75)]
    judge = write_run(root / "judge", rows, recipe | {"role": "judge", "optimizer": {"steps": 40}}, done=False)
    profile = {"tokens": 278, "gate_share": [[0.25, 0.75], [0.9, 0.1]], "chosen": [[1], [0]]}
    (judge / "experts.json").write_text(json.dumps(profile))
    age(judge, 7200)
    evil = write_run(root / ATTACK.replace("/", "\u2215"), [train_row(1, 1.0, **{ATTACK: 7.0})], {"role": ATTACK})
    (evil / "run.json").write_text(json.dumps({"stage": ATTACK, "metrics": [ATTACK], "recipe": 3}))
    report = root / "combiner-report"
    report.mkdir()
    (report / "report.md").write_text(
        f"# Is this pool worth fusing?\n\n## Summary\n\nFuse these: a, b. {ATTACK}\n\n"
        "![Accuracy over cost](cost.svg)\n\n| target | right \\| wrong |\n| --- | --- |\n| 0.65 | 0.737 |\n"
    )
    (report / "cost.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><script>alert(3)</script>'
        '<rect style="fill:red" width="40" height="20"/></svg>'
    )
    return root


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[Served]:
    """A gateway without keys over the folder of runs."""
    folder = tmp_path_factory.mktemp("gateway")
    packages = ("mixfuse.app.pages",)
    with served(folder, {"alpha": Script()}, packages=packages, members=["alpha"], ui_runs=str(runs)) as running:
        yield running


def text(page: Any) -> str:
    return str(page.locator("main").inner_text())


def test_a_run_is_opened_and_compared_with_a_baseline(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/runs")
    row = page.locator("tbody tr", has=page.get_by_role("link", name="sft", exact=True))
    assert "finished" in row.inner_text()
    assert "3 of 3" in row.inner_text()
    assert "1.25" in row.inner_text()
    page.get_by_role("link", name="sft", exact=True).click()
    loss = page.get_by_role("img", name="Loss over steps 1 to 3. training")
    page.wait_for_url("**/ui/runs/run?*")
    assert "training: from 4 to 1.25, least 1.25 at step 3" in str(loss.get_attribute("aria-label"))
    assert page.locator("svg[role=img] polyline.curve").first.get_attribute("points")
    assert page.get_by_role("img", name="Tokens a second").is_visible()
    page.get_by_label("Baseline").select_option("deep/smaller")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**with=deep**")
    assert "baseline: from 4.5 to 3.25" in str(
        page.get_by_role("img", name="Loss over steps 1 to 3. training").get_attribute("aria-label")
    )
    assert page.locator("polyline.dashed").count() >= 1
    differing = page.locator("table", has=page.get_by_text("lora.r", exact=True))
    assert "16" in differing.inner_text()
    assert "8" in differing.inner_text()
    assert "<script>alert(1)</script>" in differing.inner_text(), "as text"
    assert "learning_rate" not in differing.inner_text(), "what is the same is left out"


def test_a_judge_that_was_cut_off_says_so_and_shows_its_experts(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/runs/run?path=judge")
    assert "cut off at step 2 of 40" in text(page)
    assert "This run was cut off" in text(page)
    orders = page.get_by_role("img", name="Judge: right in both orders, and consistent")
    assert "the same in both orders: from 0 to 0.75" in str(orders.get_attribute("aria-label"))
    assert page.get_by_role("img", name="Judge: calibration error").is_visible()
    heat = page.locator("svg.heat")
    assert heat.locator("path.h9").get_attribute("d") == "M76,22h12v12h-12z", "layer 1, expert 0"
    assert heat.locator("rect.frame").count() == 2
    page.get_by_text("The heat map as a table").click()
    assert "1 (75.0 %)" in text(page)


def test_a_live_run_follows_what_is_written(gateway: Served, runs: Path, tab: Callable[..., Watched]) -> None:
    live = write_run(runs / "live", [train_row(1, 9.0)], {"optimizer": {"steps": 5}}, done=False)
    page = tab().page
    page.goto(f"{gateway.url}/ui/runs/run?path=live")
    assert "running at step 1 of 5" in text(page)
    with (live / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(train_row(2, 8.5)) + '\n{"step": 3, "lo')
    page.get_by_text("at step 2 of 5").wait_for()
    assert "hold no row" not in text(page), "half a row is being written"
    assert "loss\t8.5" in text(page)


def test_a_report_opens_with_its_pictures(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/runs")
    page.get_by_role("link", name="combiner-report").click()
    expect(page.get_by_role("heading", name="Is this pool worth fusing?")).to_be_visible()
    page.wait_for_load_state("load")
    assert ATTACK in text(page)
    assert "right | wrong" in text(page)
    picture = page.get_by_role("img", name="Accuracy over cost")
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 40
    answer = httpx.get(f"{gateway.url}/ui/runs/picture?path=combiner-report&file=cost.svg")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]


def test_what_files_hold_does_nothing(gateway: Served, tab: Callable[..., Watched]) -> None:
    page = tab().page
    page.goto(f"{gateway.url}/ui/runs")
    page.locator("a.open", has_text="alert(1)").click()
    page.wait_for_url("**/ui/runs/run?*")
    assert "<img src=x onerror=alert(2)>" in text(page)
    page.get_by_text("run.json", exact=True).click()
    assert page.locator("main img").count() == 0
    assert page.locator("main script").count() == 0


@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits_and_reads_without_scripts(gateway: Served, tab: Callable[..., Watched], width: int) -> None:
    page = tab(viewport={"width": width, "height": 800}, java_script_enabled=False).page
    for path in ("/runs", "/runs/run?path=judge&with=sft", "/runs/report?path=combiner-report"):
        page.goto(f"{gateway.url}/ui{path}")
        assert page.locator("h1").is_visible()
        reader = page.context.new_cdp_session(page)
        wide = reader.send("Page.getLayoutMetrics")["cssContentSize"]["width"]
        assert wide <= width, path


@pytest.mark.parametrize(
    "query",
    [
        "run?path=../secret", "run?path=sft/../../secret", "run?path=/etc", "run?path=", "run?path=sft%00",
        "run?path=.", "run?path=link", "run?path=link/inner", "run?path=nothing", "report?path=sft",
        "run?path=sft&with=../secret",
        "picture?path=combiner-report&file=../sft/recipe.json", "picture?path=combiner-report&file=report.md",
        "picture?path=sft&file=link.svg", "picture?path=sft&file=%2Fetc%2Fpasswd.svg", "run?path=" + "a/" * 3000,
        "run?path=%ff", "run?path=a%ed%a0%80",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(gateway: Served, runs: Path, query: str) -> None:
    secret = runs.parent / "secret"
    if not secret.exists():
        write_run(secret, [train_row(1, 1.0)], {"role": "secret of another folder"})
        write_run(secret / "inner", [train_row(1, 1.0)], {"role": "secret of another folder"})
        (runs / "link").symlink_to(secret)
        (runs / "sft" / "link.svg").symlink_to(secret / "recipe.json")
    answer = httpx.get(f"{gateway.url}/ui/runs/{query}")
    assert answer.status_code == 404
    assert "secret of another folder" not in answer.text
    assert "link" not in httpx.get(f"{gateway.url}/ui/runs").text.replace("<link", "")


DEEP = "[" * 100_000
ODD = {
    "numbers": b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 1e999, "time": "x"}\n',
    "huge": b'{"step": 1, "loss": 1' + b"0" * 400 + b'}\n{"step": 2, "loss": 1.7e308}\n{"step": 3, "loss": -1.7e308}\n',
    "digits": b'{"step": 1, "loss": 1' + b"0" * 6000 + b"}\n",
    "no rows": b'null\n[]\n"text"\n7\n{"step": -1}\n{"step": true}\n{"loss": 1}\n\xff\xfe\n\x00\n',
    "deep": b'{"step": 1, "loss": ' + DEEP.encode() + b"}\n",
    "one long line": b'{"step": 1, "loss": "' + b"x" * 2_000_000 + b'"}\n',
    "empty": b"",
    "names": b'{"step": 1, "": 2, "a": {"b": 1}, "' + b"y" * 5000 + b'": 3}\n',
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "other", [b"{", b'{"a": ' + DEEP.encode(), b"[1]", b'{"optimizer": {"steps": "x"}, "gate_share": 3}']
)
def test_odd_files_are_told_and_never_an_error(gateway: Served, runs: Path, name: str, other: bytes) -> None:
    run = runs / "odd" / name / str(len(other))
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes(ODD[name])
    for file in ("recipe.json", "run.json", "experts.json"):
        (run / file).write_bytes(other)
    for page in (f"run?path=odd/{name}/{len(other)}", f"run?path=sft&with=odd/{name}/{len(other)}", ""):
        answer = httpx.get(f"{gateway.url}/ui/runs/{page}".rstrip("/"))
        assert answer.status_code == 200, answer.text
        assert not re.search(r'(points|cx|cy|[xy][12]?)="[^"]*(nan|inf)', answer.text)
        assert len(answer.content) < 400_000


def test_values_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [train_row(1, 1.0)], {})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "loss": NaN}\nnonsense\n{"step": 3, "loss": 2.5}\n')
    run = RunsFolder(tmp_path).run("run")
    assert run.metrics.series["loss"] == [(1, 1.0), (3, 2.5)]
    assert run.problems == [
        "1 lines of metrics.jsonl hold no row.", "loss was no number (NaN or infinite) 1 times."
    ]  # fmt: skip


def test_a_long_run_keeps_its_peaks_and_stays_small(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 50.0 if step == 7777 else 1.0} for step in range(1, 20_001)]
    write_run(tmp_path / "run", rows, {})
    (chart,) = charts(RunsFolder(tmp_path).run("run"))
    assert len(chart.curves[0].points.split()) <= 300
    assert chart.curves[0].most == "50 at step 7777"
    assert ",10.0" in chart.curves[0].points, "the peak is drawn at the top"


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    os.mkfifo(tmp_path / "run" / "report.md")
    assert RunsFolder(tmp_path).listing() == ([], True)
    with pytest.raises(RequestError):
        RunsFolder(tmp_path).text("run", "report.md")


def test_an_api_key_does_not_open_the_runs(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.ADMIN_KEY, "an admin key")
    with opened(tmp_path / "traces.sqlite3") as database:
        secret = keys.create(database, "ann")[1]
    packages = ("mixfuse.app.pages",)
    with (
        served(tmp_path, {"alpha": Script()}, packages=packages, members=["alpha"], ui_runs=str(runs)) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        for key, status in (("", 303), (secret, 403), ("an admin key", 200)):
            if key:
                token = client.get("/ui/login").text.partition('name="csrf" content="')[2].partition('"')[0]
                client.post("/ui/login", data={"csrf": token, "key": key})
            for page in ("", "/run?path=sft", "/report?path=combiner-report"):
                assert client.get(f"/ui/runs{page}").status_code == status
            assert ('href="/ui/runs"' in client.get("/ui/traces").text) == (status == 200)


def test_every_plot_of_training_is_a_chart() -> None:
    assert {key for _, names in PLOTS for key in names} <= {key for _, curves in CHARTS for key, _ in curves}
