"""docs/parallelism.md shows what the program prints, and the program's formulas are those of the page."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import parallelism  # noqa: E402


def test_the_page_shows_what_the_program_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parallelism.main()
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    shown = page.partition("$ python benchmarks/parallelism.py\n")[2].partition("\n```")[0]
    assert shown == capsys.readouterr().out.rstrip()


def test_the_bytes_of_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planned = parallelism.planned_for(2, None)
    placed = parallelism.experts_placed(planned, imbalance=1.0)
    # 56 layers; 16384 tokens to 2 experts each, 6144 numbers of 2 bytes; there and back, three times; 7 of 8 to others.
    assert placed.inside == 6 * 56 * 16384 * 2 * 6144 * 2 * 7 / 8
    # All but the experts, three times, 15 of 16 parts from others.
    assert placed.between == 3 * 2 * (140_630_071_296 - 56 * 8 * 3 * 6144 * 16384) * 15 / 16
    gathered = parallelism.zero3(planned)
    assert gathered.inside == 0
    assert 1.9 < gathered.between / (281.3e9 * 15 / 16) < 3, "forward, recomputation and backward, some of it kept"
    packed = parallelism.zero3(parallelism.planned_for(2, "nf4"))
    assert packed.between / gathered.between == pytest.approx(82.6 / 281.3, rel=0.1)
    uneven = parallelism.experts_placed(planned, imbalance=2.0)
    share = 2 * 3 * 56 * 2 * 6144 * 16384 / (2 * (39_155_000_000 - 32768 * 6144))
    assert uneven.compute / placed.compute == pytest.approx(1 + share, rel=0.03)
