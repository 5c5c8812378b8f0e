"""The `experts profile` command: which experts a recipe's data is routed to, as a table, `experts.json` and a plot."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mixfuse.contracts import plots
from mixfuse.contracts.files import write_json
from mixfuse.contracts.strict_yaml import load as load_recipe
from mixfuse.train.data.chat_data import chat_data
from mixfuse.train.data.pair_data import pairs_datasets
from mixfuse.train.model.choose_experts import RECORD, Chosen, Load, choose, describe, measure, sample, summary
from mixfuse.train.model.load import load_base
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.processes import worker
from mixfuse.train.recipe import JudgeRecipe, SftRecipe, TrainRecipe, kind_of
from mixfuse.train.stages.checks import check_recipe
from mixfuse.train.stages.core import trainer_arguments


def profile_experts(recipe_path: Path, overrides: list[str], out: Path | None) -> dict[str, Any]:
    """Runs `mixfuse experts profile`: measures, prints a table, writes `experts.json` and `experts.png`.

    A single process loads the whole base. Under torchrun, the processes partition it, as in training.

    Args:
        recipe_path: An SFT or a judge recipe.
        overrides: `dotted.key=value` strings.
        out: The output folder; by default the recipe's `out` with `-experts` added to its name.

    Returns:
        The content of `experts.json`.

    Raises:
        MixfuseError: The recipe or its data is bad.
    """
    kind = kind_of(recipe_path, overrides)
    recipe = load_recipe(recipe_path, kind, overrides)
    check_recipe(recipe)
    partitioned = worker.launched()
    if partitioned:
        worker.prepare(recipe.threads, wandb=recipe.wandb, timeout_minutes=recipe.timeout_minutes)
        from trl import SFTConfig

        # transformers partitions a model while it loads as long as such a config lives.
        zero3_config = SFTConfig(**trainer_arguments(recipe, 1))  # noqa: F841
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    out = out or recipe.out.with_name(recipe.out.name + "-experts")
    rows = _rows(recipe, tokenizer, out)
    model: Any = load_base(recipe.base, getattr(torch, recipe.dtype), quantization=recipe.quantization)
    if not partitioned:
        model = model.to(worker.bind_device())
    load = measure(model, sample(rows, tokenizer, recipe), micro_batch=recipe.optimizer.micro_batch)
    chosen = choose(load, recipe.lora.expert_share)
    record = describe(recipe, load, chosen, model.config)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_table(load, chosen, recipe.lora.expert_share)
        print(summary(load, chosen))
        write_json(out / RECORD, record)
        plot(load, chosen, out / "experts.png")
        shutil.rmtree(out / "data", ignore_errors=True)
        print(f"{out}: {RECORD}, experts.png")
    return record


def plot(load: Load, chosen: Chosen, path: Path) -> None:
    """Writes a heat map of the gate weight, layers down and experts across, the chosen ones framed."""
    panel = plots.HeatMap(
        f"share of gate weight, {load.tokens} tokens\n(framed: chosen)",
        load.gate_share,
        framed=[(layer, expert) for layer, numbers in enumerate(chosen) for expert in numbers],
    )
    columns = [str(expert) for expert in range(len(load.gate_share[0]))]
    figure = plots.heat_maps([panel], columns=columns, rows=range(len(load.gate_share)), across="expert")
    plots.save(figure, path)


def _print_table(load: Load, chosen: Chosen, share: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"gate weight % (tokens %), * chosen to carry {share:.0%}")
    table.add_column("layer", justify="right")
    for expert in range(len(load.gate_share[0])):
        table.add_column(str(expert), justify="right")
    for layer, (gates, tokens) in enumerate(zip(load.gate_share, load.token_share, strict=True)):
        cells = [
            f"{100 * gate:.1f} ({100 * token:.0f}){'*' if expert in chosen[layer] else ' '}"
            for expert, (gate, token) in enumerate(zip(gates, tokens, strict=True))
        ]
        table.add_row(str(layer), *cells)
    console = Console(markup=False, emoji=False)
    # In a file or a pipe, the table is as wide as it needs to be.
    console.print(table, width=None if console.is_terminal else 12 + 16 * len(load.gate_share[0]))


def _rows(recipe: TrainRecipe, tokenizer: Any, out: Path) -> Sequence[Any]:
    """The rows that training would read; tokenised chats are written below `out`."""
    rows: Any
    if isinstance(recipe, SftRecipe):
        rows = chat_data(recipe.model_copy(update={"out": out}), tokenizer).table
    else:
        rows = pairs_datasets(cast(JudgeRecipe, recipe), tokenizer).train
    return cast(Sequence[Any], rows)
