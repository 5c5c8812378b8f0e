"""Reports: Markdown and HTML for people, JSON for machines, and the plots that both show.

The HTML is one file that loads nothing. Its last section lists every value of the JSON. All pages have one template,
`report.html.jinja`; all plots come from `plots.py`.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts import plots
from mixfuse.contracts.extras import needs_extra
from mixfuse.contracts.files import disk_errors, write_json, write_text

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        file: The name of its file beside the Markdown, ending in `.svg` or `.png`.
        figure: From `plots`.
        caption: What the plot shows.
    """

    file: str
    figure: "Figure"
    caption: str

    def svg(self) -> "Markup":
        """The drawing, for a page; matplotlib has escaped the text in it."""
        from markupsafe import Markup

        return Markup(plots.svg(self.figure, name=Path(self.file).stem, title=self.caption))  # noqa: S704


Block = str | Table | Plot
"""A paragraph, a table or a plot."""


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then paragraphs, tables and plots in this order."""

    title: str
    blocks: Sequence[Block]


def write(out: Path, title: str, sections: Sequence[Section], data: dict[str, Any]) -> None:
    """Writes `report.md` with its plots, `report.html` and `report.json` into a folder.

    Args:
        out: The folder. An earlier report in it is replaced.
        title: The heading.
        sections: In order; the page sets the first one off as the summary.
        data: Every figure, as JSON.

    Raises:
        MixfuseError: The folder cannot be written, or an optional package is missing.
    """
    page = html(title, sections, data)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # Everything is made before anything is replaced, so that pages and plots of two reports are not mixed.
        with tempfile.TemporaryDirectory(prefix=".report.", suffix=".partial", dir=out) as folder:
            made = Path(folder)
            for section in sections:
                for block in section.blocks:
                    if isinstance(block, Plot):
                        plots.save(block.figure, made / block.file)
            write_text(made / "report.md", markdown(title, sections))
            write_text(made / "report.html", page)
            write_json(made / "report.json", data)
            for file in made.iterdir():
                os.replace(file, out / file.name)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """A report as Markdown; plots are referred to by their files. A section without a title has no heading."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}"] if section.title else []
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Plot):
        return f"![{block.caption}]({block.file})"
    rows = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows
    )


def html(title: str, sections: Sequence[Section], data: dict[str, Any]) -> str:
    """A report as one HTML page with its plots inside.

    Args:
        title: The heading.
        sections: In order.
        data: Every figure; listed at the end.

    Raises:
        MixfuseError: Jinja2 is not installed.
    """
    with needs_extra("measure"):
        import jinja2
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, values=list(flat(data))) + "\n"


def flat(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a JSON document: (its path, the value as JSON writes it)."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from flat(value, f"{path}[{number}]")
    else:
        yield path, json.dumps(data, ensure_ascii=False)
