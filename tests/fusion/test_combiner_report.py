"""`mixfuse combiner report`: its figures, its verdict in words, and its files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from combiner_pools import pool, write_pool
from scipy import stats

from mixfuse.cli.entry import main
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.measure.combiner_fit import cross_validate, fit_combiner
from mixfuse.fusion.measure.combiner_page import FILES, sections
from mixfuse.fusion.measure.combiner_report import Report, of_fit, of_replay
from mixfuse.fusion.measure.combiner_verdict import needed
from mixfuse.fusion.measure.statistics import difference

EVEN = {"a": 0.7, "b": 0.65, "c": 0.65}


def made(questions: Sequence[Question], prices: Mapping[str, float] | None = None) -> Report:
    return of_fit(cross_validate(questions, "choice", prices), questions, lambda _: None)


@pytest.fixture(scope="module")
def even() -> Report:
    return made(pool(600, EVEN), {"a": 5, "b": 1, "c": 1})


def test_members_of_like_strength_are_to_be_fused(even: Report) -> None:
    assert even.verdict.choice == "fuse"
    assert even.use == ["a", "b", "c"]
    assert even.verdict.words.startswith("Fuse these: a, b, c. Weighing their answers is right more often than a: +0.")
    assert all(member.worth is not None and member.worth.low > 0 for member in even.members.values())
    assert even.ways["weighed"].low < even.figures.weighed < even.ways["weighed"].high
    assert even.ways["majority"].value < even.ways["oracle"].value


def test_what_no_selection_can_beat_is_said_with_its_exact_bound(even: Report) -> None:
    failed = round(even.figures.all_fail.value * even.figures.n)
    low = stats.beta.ppf(0.025, failed, 600 - failed + 1)
    assert even.to_json()["cannot_be_beaten"] == pytest.approx(1 - low)
    text = str(sections(even)[0].blocks)
    assert f"can be right on more than {100 * (1 - low):.1f} %" in text


def test_a_strong_member_beside_weak_ones_is_used_alone() -> None:
    report = made(pool(1500, {"a": 0.9, "b": 0.3, "c": 0.3}))
    assert (report.verdict.choice, report.use) == ("member", ["a"])
    assert "a gain of more than 2% is ruled out" in report.verdict.words


def test_too_few_marks_are_told_from_no_gain() -> None:
    report = made(pool(60, {"a": 0.75, "b": 0.6, "c": 0.4}))
    assert report.verdict.choice == "unknown"
    enough = report.verdict.enough
    assert enough is not None
    assert 60 < enough < 20_000
    assert f"About {enough} such questions would decide. Until then use a." in report.verdict.words


def test_the_best_member_of_each_domain_is_named_where_weighing_does_no_more() -> None:
    # Two members: votes can turn nothing round, and who is right depends on the domain alone.
    domains = {"law": {"a": 0.9, "b": 0.3}, "maths": {"a": 0.3, "b": 0.8}}
    report = made(pool(600, {"a": 0.5, "b": 0.5}, domains=domains))
    assert report.verdict.choice in ("fuse", "domains")
    assert {name: domain.member for name, domain in report.domains.items()} == {"law": "a", "maths": "b"}
    assert report.ways["best_by_domain"].low > report.figures.best_member_accuracy


def test_a_copy_earns_no_place_and_is_left_out() -> None:
    questions = pool(800, {"a": 0.7, "b": 0.66, "c": 0.66, "d": 0.4}, copies={"d": "a"}, copied=1.0)
    report = made(questions)
    assert report.verdict.choice == "fuse"
    for name in ("b", "c"):
        worth = report.members[name].worth
        assert worth is not None
        assert worth.low > 0
    copy = report.members["d"].worth
    assert copy is not None
    assert copy.low <= 0 <= copy.high
    if report.kept:
        assert len({"a", "d"} & set(report.kept.members)) == 1
        assert report.kept.gain.low > 0
        assert report.use == report.kept.members


def test_a_replay_reports_on_answers_that_were_not_fitted_to() -> None:
    combiner = fit_combiner(pool(400, EVEN), "choice")
    report = of_replay(combiner, pool(500, EVEN, seed=1), lambda _: None)
    assert report.figures.n == 500
    assert not report.refitted
    worth = report.members["b"].worth
    without = report.members["b"].without
    assert worth is not None
    assert without is not None
    assert worth.value == pytest.approx(report.figures.weighed - without.value)


def test_the_number_of_marks_that_would_do_shows_such_a_gain_four_times_in_five() -> None:
    """Draws pools of that size in which the gain is there, and counts how often McNemar's test shows it."""
    generator = np.random.default_rng(0)
    seen = np.concatenate([np.ones(18), -np.ones(12), np.zeros(270)])
    gap = difference(range(300), seen.tolist(), [0.0] * 300)
    assert gap.value == pytest.approx(0.02)
    count = needed(gap, seen.tolist(), [0.0] * 300)
    shown = 0
    for _ in range(200):
        better, worse, _ = generator.multinomial(count, [0.06, 0.04, 0.9])
        shown += stats.binomtest(better, better + worse).pvalue < 0.05
    assert 0.7 < shown / 200 < 0.9


def test_the_command_writes_a_report_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_pool(tmp_path / "pool.jsonl", pool(150, EVEN)), tmp_path / "report"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.md").write_text("an earlier report")
    words = ["combiner", "report", str(data), "--out", str(out)]
    assert main([*words, "--json", "--price", "a=5", "--price", "b=1", "--price", "c=1"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((out / "report.json").read_text())
    assert {**written, "out": str(out)} == printed
    assert {path.name for path in out.iterdir()} == {*FILES, "notes.txt"}
    page = (out / "report.html").read_text()
    assert printed["verdict"] in (out / "report.md").read_text()
    assert page.count("<svg") == 3
    for title in ("Accuracy over cost", "Is its confidence right?", "Which members earn their place"):
        assert title in page
    assert set(printed["by_member"]) == {"a", "b", "c"}


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pool(tmp_path / "pool.jsonl", pool(100, EVEN))
    (tmp_path / "file").write_text("")
    assert main(["combiner", "report", str(data), "--out", str(tmp_path / "file" / "report")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pool.jsonl", "file"}


def test_names_with_dollars_and_brackets_are_drawn_and_printed(tmp_path: Path) -> None:
    names = {"$a$b^{": 0.7, "[red]b": 0.65, "<c>|": 0.65}
    data, out = write_pool(tmp_path / "pool.jsonl", pool(100, names)), tmp_path / "report"
    assert main(["combiner", "report", str(data), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "$a$b^{" in page
    assert "<c>|" not in page
