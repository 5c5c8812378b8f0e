"""The data card beside a pairs file: the sources of the pairs, the pairs left out, and the bias of the rest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.files import atomic_file, write_json, write_text
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
    plotted = find_spec("matplotlib") is not None
    if plotted:
        _plot(selection, out.with_name(f"{out.stem}.card.png"))
    write_json(out.with_name(f"{out.stem}.card.json"), card)
    write_text(out.with_name(f"{out.stem}.card.md"), _markdown(out, card, plotted))
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


def _markdown(out: Path, card: Mapping[str, Any], plotted: bool) -> str:
    def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        cells = [heads, ["---"] * len(heads), *rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)

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
    parts = [
        f"# Preference pairs `{out.name}`",
        f"{card['train_pairs'] // 2} training pairs of {card['prompts']['train']} prompts and "
        f"{card['dev_pairs'] // 2} dev pairs (`{dev_path(out).name}`) of {card['prompts']['dev']} other prompts, each "
        f"written in both orders. Judge protocol {card['judge_protocol'][:12]}. No model is named in the files.",
        "## Sources",
        table(("name", "kind", "file", "SHA-256", "licence", "read"), read),
        table(("pairs from", "kept"), list(card["by_source"].items())),
        "## Left out",
        table(("reason, in the order of the filters", "pairs"), list(card["left_out"].items())),
        "## Bias",
        "Area under the ROC curve of rules that read no content: they prefer the longer answer, the one with more "
        "lines, list items, markup or digits, or the author who won more often (counted on these same pairs). 0.5 is "
        f"chance. Before and after balancing ({', '.join(card['balanced']) or 'nothing was balanced'}).",
        table(("rule", "before", "after"), auc),
    ]
    if plotted:
        parts.append(f"![How much longer the better answer is]({out.stem}.card.png)")
    return "\n\n".join(parts) + "\n"


def _plot(selection: Selection, path: Path) -> None:
    """Writes a histogram: by how many characters the better answer is longer, before and after balancing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before, after = selection.lengths
    sizes = sorted(map(abs, before))
    edge = max(1, sizes[int(0.98 * (len(sizes) - 1))])
    bins = [edge * step / 20 for step in range(-20, 21)]

    def within(lengths: Sequence[int]) -> list[int]:
        return [min(max(length, -edge), edge) for length in lengths]

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(within(before), bins, color="lightgrey", label=f"before, AUC {selection.before.auc['length']:.3f}")
    axes.hist(
        within(after), bins, histtype="step", color="tab:blue", label=f"after, AUC {selection.after.auc['length']:.3f}"
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="characters the better answer has more (the outermost bars: or further out)", ylabel="pairs")
    axes.legend()
    with atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=120)
