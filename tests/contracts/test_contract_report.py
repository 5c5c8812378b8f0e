"""Reports and plots: pages stand alone and escape what they show, and plots show the values they are given."""

import itertools
import re
import struct
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from mixfuse.contracts import plots, report
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.plots import HeatMap, Mark, Point
from mixfuse.contracts.report import Plot, Section, Table

HOSTILE = '<script src="http://evil/x.js">& "quoted"</script>'


def ticks(figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def written(folder: Path, *blocks: report.Block) -> tuple[str, str]:
    report.write(folder, "A title", [Section("First", blocks)], {"a": {"b": [1.5, HOSTILE]}})
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_a_page_escapes_what_it_shows_and_loads_nothing(tmp_path: Path):
    figure = plots.intervals([Mark(HOSTILE, (0.5, 0.4, 0.6))])
    page, _ = written(tmp_path, HOSTILE, Table((HOSTILE,), [(HOSTILE,)]), Plot("p.svg", figure, HOSTILE))
    assert "<script" not in page
    assert page.count("&lt;script src=") >= 6  # the paragraph, two cells, the caption, the plot's title and its label
    assert not re.search(r'<[^>]*(?:src|href)="(?!#)', page)
    assert "@import" not in page


def test_every_value_of_the_json_is_on_the_page_with_its_path(tmp_path: Path):
    page, _ = written(tmp_path, "words")
    assert "<td>a.b[0]</td><td>1.5</td>" in page
    assert "<td>a.b[1]</td>" in page


def test_only_the_first_section_is_set_off_as_the_summary():
    page = report.html("t", [Section("one", ["x"]), Section("two", ["y"])], {})
    assert re.findall(r'class="summary">\n<h2>(\w+)', page) == ["one"]


def test_markdown_holds_the_same_and_its_plots_are_files(tmp_path: Path):
    figure = plots.scatter([(Mark("x", (0.5, 0.4, 0.6)), 2.0)], across="seconds")
    _, text = written(tmp_path, "words", Table(("a", "b"), [("1|2", "two\nlines")]), Plot("p.svg", figure, "caption"))
    assert text == (
        "# A title\n\n## First\n\nwords\n\n| a | b |\n| --- | --- |\n| 1\\|2 | two lines |\n\n![caption](p.svg)\n"
    )
    xml.etree.ElementTree.parse(tmp_path / "p.svg")
    assert "## " not in report.markdown("t", [Section("", ["introduction"])])


def test_a_drawing_is_the_same_every_time_and_shares_no_ids_with_another():
    def drawn(name: str) -> str:
        return plots.svg(plots.reliability({"raw": [Point(0.6, 0.5, 0.3), Point(0.9, 0.8, 0.7)]}), name=name, title="t")

    assert drawn("a") == drawn("a")
    assert drawn("a").startswith("<svg ")
    ids = [set(re.findall(r'<(?:clipPath|path|symbol) id="([^"]+)"', drawn(name))) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_intervals_draw_every_value_with_its_ends_from_top_to_bottom():
    marks = [Mark("one", (0.2, 0.1, 0.4)), Mark("two", (0.8, 0.7, 0.9), muted=True)]
    figure = plots.intervals(marks, reference=0.25)
    axes = figure.axes[0]
    lines = [(tuple(line.get_xdata()), tuple(line.get_ydata()), line.get_color()) for line in axes.lines]
    assert lines[:2] == [((0.1, 0.4), (0, 0), plots.BLUE), ((0.2,), (0,), plots.BLUE)]
    assert lines[2:4] == [((0.7, 0.9), (1, 1), plots.GREY), ((0.8,), (1,), plots.GREY)]
    assert lines[4][0] == (0.25, 0.25)
    assert ticks(figure, "y") == ["one", "two"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first mark is at the top"


@pytest.mark.parametrize("value", [0.0, 0.5, 0.97])
def test_the_names_of_a_scatter_do_not_overlap_and_stay_inside(value: float):
    marks = [(Mark(f"m{n}", (value, 0.9, 1.0)), float(n)) for n in range(6)]
    axes = plots.scatter(marks, across="dollars").axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert all(high - low >= 0.0649 for low, high in itertools.pairwise(heights))
    assert 0 <= heights[0] <= heights[-1] <= 1
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert sorted(points) == [(float(n), value) for n in range(6)]


def test_heat_maps_show_their_values_and_frame_cells():
    panel = HeatMap("t", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], high=0.6, framed=[(1, 2)])
    axes = plots.heat_maps([panel], columns=["a", "b", "c"], rows=[4, 9], across="expert").axes[0]
    assert axes.images[0].get_array().tolist() == panel.values
    assert axes.images[0].get_clim() == (0, 0.6)
    assert [patch.get_xy() for patch in axes.patches] == [pytest.approx((1.54, 0.58))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "9"]


def test_a_histogram_counts_and_a_png_is_written(tmp_path: Path):
    figure = plots.histogram({"before": [1, 1, 5], "after": [5]}, [0, 2, 4, 6], across="x", up="pairs")
    assert [bar.get_height() for bar in figure.axes[0].patches[:3]] == [2, 0, 1]
    plots.save(figure, tmp_path / "deep" / "p.png")
    header = (tmp_path / "deep" / "p.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:])) > 300


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MixfuseError, match=r"jinja2 is not installed; install it with: pip install 'mixfuse\[measure"):
        report.html("t", [], {})
    with pytest.raises(MixfuseError, match=r"pip install 'mixfuse\[other\]'"), needs_extra("other"):
        import no_such_package  # noqa: F401
