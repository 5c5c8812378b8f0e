"""The demo's last screen, and report.md, which opens with the same words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markdown import Markdown

from mixfuse.contracts.files import read_jsonl, write_text


class Claim(NamedTuple):
    """Something the demo is to show.

    Attributes:
        holds: Whether it did.
        words: What it is.
        figures: What says so.
    """

    holds: bool
    words: str
    figures: str


def claims(found: dict[str, Any]) -> list[Claim]:
    """What was to be learned, and whether it was."""
    judge, fusion, swap, parity = found["judge"], found["fusion"], found["swap"], found["parity"]
    base, domain = found["base_accuracy_interval"], found["domain_accuracy_interval"]
    shorter = judge["baselines"]["shorter"]["both_orders_correct"]["value"]
    trained = f"{pct(judge['trained_both_orders'])} {interval(judge['trained_both_orders_interval'])}"
    return [
        Claim(
            domain[0] > base[1],
            "the domain model answers more held-out tasks than the base, by more than the intervals",
            f"{pct(found['domain_accuracy'])} {interval(domain)}, base {pct(found['base_accuracy'])} {interval(base)}",
        ),
        Claim(
            found["domain_accuracy_lenient"] > found["base_accuracy_lenient"],
            "it does so also where the answer is taken out of its sentence",
            f"{pct(found['domain_accuracy_lenient'])}, base {pct(found['base_accuracy_lenient'])}",
        ),
        Claim(
            judge["trained_both_orders"] > judge["untrained_both_orders"],
            "the trained judge is right in both orders of a pair more often than the untrained one",
            f"{trained}, untrained {pct(judge['untrained_both_orders'])}",
        ),
        Claim(
            judge["trained_both_orders"] > judge["random"],
            "it beats a coin",
            f"{trained}, a coin {pct(judge['random'])}",
        ),
        Claim(
            judge["trained_both_orders"] > shorter,
            "it beats the rule that the shorter answer wins",
            f"{trained}, the rule {pct(shorter)}",
        ),
        Claim(
            fusion["best_of_accuracy"] > fusion["best_single_accuracy"],
            "a fused answer is right more often than the best member's",
            f"{pct(fusion['best_of_accuracy'])} {interval(fusion['best_of_interval'])}, "
            f"{fusion['best_single']} {pct(fusion['best_single_accuracy'])}",
        ),
        Claim(
            fusion["auto_accuracy"] > fusion["auto_best_member_accuracy"],
            "auto, which asks whom the combiner names, is right more often than the best member",
            f"{pct(fusion['auto_accuracy'])} at {fusion['auto_cost_ratio']:.2f} of its cost, "
            f"{fusion['auto_best_member']} {pct(fusion['auto_best_member_accuracy'])}",
        ),
        Claim(
            not swap["failed"],
            "the hot swap lost no request",
            f"{swap['failed']} of {swap['requests_during']} failed",
        ),
        Claim(
            max(parity.values()) <= 1e-3,
            "vLLM serves the adapters as PEFT trained them",
            f"log-probabilities differ by at most {max(parity.values()):.1e} nats",
        ),
    ]


def summary(out: Path, found: dict[str, Any], *, quick: bool) -> str:
    """What a person wants to know at the end, as Markdown."""
    base = (
        "a tiny random base, which shows the steps and learns nothing of use"
        if quick
        else "the embedded base: SmolLM2-135M upcycled into a Mixtral of 373 M parameters"
    )
    lines = {
        holds: "\n".join(f"- {claim.words} ({claim.figures})" for claim in claims(found) if claim.holds is holds)
        for holds in (True, False)
    }
    usage = found["usage"]
    return f"""The loop ran on {base}.

**Shown**

{lines[True] or "- nothing"}

**Not shown**

{lines[False] or "- nothing: all of it held"}

**Taken:** {usage["cpu_minutes"]:.0f} CPU minutes in {usage["wall_minutes"]:.0f} minutes, at most \
{usage["peak_memory_gb"]:.1f} GB of memory.

**Left:** the adapters in `{out}/adapters`, all figures in `{out}/report.md` and `{out}/results.json`, the fused
answers in `{out}/fused`, logs in `{out}/logs`.

**Look:** `source .venv/bin/activate`, then `mixfuse ui --runs {out}` shows the runs and reports at http://127.0.0.1:8081/ui.

**Next:** {next_step(quick=quick)}
"""


def next_step(*, quick: bool) -> str:
    """What to do after the demo."""
    if quick:
        return "`scripts/demo` runs the same on a base that learns."
    return (
        "`mixfuse serve configs/tiny/serve.yaml` serves the domain model, with a page that asks it, at "
        'http://127.0.0.1:8080/ui; README.md, "A first session", goes on from there.'
    )


def show(out: Path, found: dict[str, Any], *, quick: bool) -> None:
    """Prints the last screen."""
    console = Console()
    console.rule("[bold]finished[/]", align="left")
    console.print(Markdown(summary(out, found, quick=quick)))


def write_report(out: Path, found: dict[str, Any], *, quick: bool) -> None:
    """Writes report.md and its two plots."""
    _plots(out, found)
    judge, fusion, usage = found["judge"], found["fusion"], found["usage"]
    shorter = judge["baselines"]["shorter"]["both_orders_correct"]["value"]
    rows = [
        ("base accuracy", found["base_accuracy"], interval(found["base_accuracy_interval"])),
        ("base accuracy, answer taken out of the sentence", found["base_accuracy_lenient"], ""),
        ("domain accuracy", found["domain_accuracy"], interval(found["domain_accuracy_interval"])),
        ("domain accuracy, answer taken out of the sentence", found["domain_accuracy_lenient"], ""),
        ("judge right in both orders, untrained", judge["untrained_both_orders"], ""),
        ("judge right in both orders, trained", judge["trained_both_orders"],
         interval(judge["trained_both_orders_interval"])),
        ("judge consistent, untrained", judge["untrained_consistency"], ""),
        ("judge consistent, trained", judge["consistency"], ""),
        ("a coin, both orders", judge["random"], ""),
        ("always the shorter answer, both orders", shorter, ""),
        (f"best single member ({fusion['best_single']}), asked once", fusion["best_single_accuracy"], ""),
        ("that member, sampled as often as the pool and judged", fusion["self_fusion_accuracy"], ""),
        ("best_of", fusion["best_of_accuracy"], interval(fusion["best_of_interval"])),
        ("auto, the same tasks", fusion["auto_live_accuracy"], ""),
        ("majority of the members, the same tasks", fusion["majority_accuracy"], ""),
        ("oracle: some candidate is right", fusion["oracle_accuracy"], ""),
        (f"best single member ({fusion['auto_best_member']}), all held-out tasks",
         fusion["auto_best_member_accuracy"], ""),
        ("majority, all held-out tasks", fusion["auto_majority_accuracy"], ""),
        ("weighed, everybody asked, all held-out tasks", fusion["auto_weighed_accuracy"], ""),
        ("auto, all held-out tasks", fusion["auto_accuracy"], ""),
        ("oracle, all held-out tasks", fusion["auto_oracle_accuracy"], ""),
    ]  # fmt: skip
    accuracies = "\n".join(f"| {name} | {pct(value)} | {spread} |" for name, value, spread in rows)
    steps = "\n".join(f"| {name} | {minutes:.1f} |" for name, minutes in usage["cpu_minutes_by_step"].items())
    text = f"""# The demo's report

{summary(out, found, quick=quick)}
## All figures

{found["heldout_tasks"]} held-out tasks for base and domain model (greedy), {judge["n"]} held-out pairs for the judge,
{fusion["n"]} held-out tasks for fusion. Tasks are split by prompt; nothing was tuned on the held-out ones.
Intervals are 95 %.

| what | value | interval |
| --- | --- | --- |
{accuracies}

{fusion["verdict"]}

The members answer greedily, so one of them sampled more often says the same again: at equal compute it stays where
it is. A pool with a temperature would be a harder rival here.

`auto` on {fusion["auto_n"]} held-out tasks, replayed on the members' recorded answers:
{pct(fusion["auto_accuracy"])} right, at {fusion["auto_cost_ratio"]:.2f} of the cost of {fusion["auto_best_member"]};
its confidence is off by {fusion["auto_ece"]:.3f} on average. {fusion["auto_fallback"]}

Parity of vLLM and PEFT (worst difference of a log-probability, nats): domain {found["parity"]["domain"]:.1e},
judge {found["parity"]["judge"]:.1e}.

![Training curves](curves.png)
![Accuracy](accuracy.png)

## CPU minutes

Of all processes, user and system time.

| step | CPU minutes |
| --- | --- |
{steps}
"""
    write_text(out / "report.md", text)


def pct(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.0f} %"


def interval(bounds: Sequence[float]) -> str:
    """An interval in per cent."""
    return f"[{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]"


def _plots(out: Path, found: dict[str, Any]) -> None:
    """Draws curves.png and accuracy.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, stage, title in ((axes[0], "sft", "SFT: loss"), (axes[1], "judge", "judge (DPO): loss")):
        rows = [row for row in read_jsonl(out / stage / "metrics.jsonl") if "loss" in row]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker=".")
        axis.set(title=title, xlabel="optimiser step", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)

    fusion = found["fusion"]
    bars = {
        "base": (found["base_accuracy"], found["base_accuracy_interval"]),
        "domain": (found["domain_accuracy"], found["domain_accuracy_interval"]),
        "best_of": (fusion["best_of_accuracy"], fusion["best_of_interval"]),
        "auto": (fusion["auto_accuracy"], [fusion["auto_accuracy"]] * 2),
        "oracle": (fusion["oracle_accuracy"], [fusion["oracle_accuracy"]] * 2),
    }
    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    errors = [[v - i[0] for v, i in bars.values()], [i[1] - v for v, i in bars.values()]]
    axis.bar(list(bars), [v for v, _ in bars.values()], yerr=errors, capsize=4, color="#4878a8")
    axis.set(title="accuracy on held-out tasks (95 % intervals)", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=120)
    pyplot.close(figure)
