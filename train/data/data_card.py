"""The data card beside a pairs file: the sources of the pairs, the pairs left out, and the bias of the rest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol, plots
from mixfuse.contracts.files import write_json, write_text
from mixfuse.contracts.report import Plot, Section, Table, markdown
from mixfuse.train.data.pair_filters import Filters, Selection
from mixfuse.train.data.pairs import dev_path


def write(
    out: Path,
    selection: Selection,
    *,
    sources: Sequence[Mapping[str, Any]],
    filters: Filters,
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Writes `NAME.card.json`, `NAME.card.md` and, if matplotlib is installed, `NAME.card.png`.

    Args:
        out: The pairs file.
        selection: The pairs in it.
        sources: Facts about each source: `name`, `kind`, `path`, `sha256`, `licence`, `weight`, `read`.
        filters: The filters' settings.
        counts: `train_pairs` and `dev_pairs`: rows written.

    Returns:
        The content of `NAME.card.json`.
    """
    card: dict[str, Any] = {
        "pairs": out.name,
        **counts,
        "prompts": {
            side: len({pair.prompt for pair in own})
            for side, own in (("train", selection.train), ("dev", selection.dev))
        },
        "by_source": dict(sorted(Counter(pair.source for pair in (*selection.train, *selection.dev)).items())),
        "left_out": selection.left_out,
        "auc": {"before": selection.before.auc, "after": selection.after.auc},
        "balanced": list(filters.balance),
        "sources": [dict(source) for source in sources],
        "filters": filters.model_dump(mode="json", include=set(Filters.model_fields)),
        "judge_protocol": judge_protocol.digest(),
    }
    plot = _plot(selection, f"{out.stem}.card.png") if find_spec("matplotlib") else None
    if plot:
        plots.save(plot.figure, out.with_name(plot.file))
    write_json(out.with_name(f"{out.stem}.card.json"), card)
    write_text(out.with_name(f"{out.stem}.card.md"), _markdown(card, out, plot))
    return card


def lines(card: Mapping[str, Any]) -> list[str]:
    """The lines of a card that `mixfuse pairs build` prints."""
    printed = []
    for source in card["sources"]:
        read = ", ".join(f"{name} {count}" for name, count in source["read"].items())
        printed.append(f"{source['name']} ({source['kind']}): {read}")
    taken = [f"{reason} {count}" for reason, count in card["left_out"].items() if count]
    printed.append(f"pairs left out: {', '.join(taken) or 'none'}")
    figures = [
        f"{name} {before:.3f}" + (f" -> {card['auc']['after'][name]:.3f}" if card["auc"]["after"].get(name) else "")
        for name, before in card["auc"]["before"].items()
    ]
    printed.append(f"AUC of rules that read no content, before and after balancing: {', '.join(figures)}")
    return printed


def _markdown(card: Mapping[str, Any], out: Path, plot: Plot | None) -> str:
    after = card["auc"]["after"]
    auc = [
        (name, f"{before:.3f}", f"{after[name]:.3f}" if name in after else "not known")
        for name, before in card["auc"]["before"].items()
    ]
    read = [
        (
            source["name"],
            source["kind"],
            Path(source["path"]).name,
            (source["sha256"] or "")[:12],
            source["licence"] or "not stated",
            ", ".join(f"{name} {count}" for name, count in source["read"].items()),
        )
        for source in card["sources"]
    ]
    introduction = (
        f"{card['train_pairs'] // 2} training pairs of {card['prompts']['train']} prompts and "
        f"{card['dev_pairs'] // 2} dev pairs (`{dev_path(out).name}`) of {card['prompts']['dev']} other prompts, each "
        f"written in both orders. Judge protocol {card['judge_protocol'][:12]}. No model is named in the files."
    )
    bias = (
        "Area under the ROC curve of rules that read no content: they prefer the longer answer, the one with more "
        "lines, list items, markup or digits, or the author who won more often (counted on these same pairs). 0.5 is "
        f"chance. Before and after balancing ({', '.join(card['balanced']) or 'nothing was balanced'})."
    )
    sections = [
        Section("", [introduction]),
        Section(
            "Sources",
            [
                Table(("name", "kind", "file", "SHA-256", "licence", "read"), read),
                Table(("pairs from", "kept"), _counts(card["by_source"])),
            ],
        ),
        Section("Left out", [Table(("reason, in the order of the filters", "pairs"), _counts(card["left_out"]))]),
        Section("Bias", [bias, Table(("rule", "before", "after"), auc), *([plot] if plot else [])]),
    ]
    return markdown(f"Preference pairs `{out.name}`", sections)


def _counts(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, str(count)) for name, count in counts.items()]


def _plot(selection: Selection, file: str) -> Plot:
    """A histogram: by how many characters the better answer is longer, before and after the balance."""
    before, after = selection.lengths
    sizes = sorted(map(abs, before))
    edge = max(1, sizes[int(0.98 * (len(sizes) - 1))])

    def within(lengths: Sequence[int]) -> list[float]:
        return [min(max(length, -edge), edge) for length in lengths]

    figure = plots.histogram(
        {
            f"before, AUC {selection.before.auc['length']:.3f}": within(before),
            f"after, AUC {selection.after.auc['length']:.3f}": within(after),
        },
        [edge * step / 20 for step in range(-20, 21)],
        across="characters the better answer has more (the outermost bars: or further out)",
        up="pairs",
    )
    return Plot(file, figure, "How much longer the better answer is")
