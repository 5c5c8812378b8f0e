"""A run's metrics: `metrics.jsonl` and `metrics.png` always, Weights & Biases if the recipe says so."""

import json
import os
import secrets
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts import plots
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.family import Shape
from mixfuse.contracts.files import read_json, write_text
from mixfuse.train.planning.training_plan import forward_flops
from mixfuse.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from transformers import TrainerCallback

# The plots, in this order: title, and the keys of the rows that share one plot.
PLOTS = (
    ("loss", ("loss", "eval_loss")),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens/s", ("tokens_per_second",)),
    ("model FLOPs utilisation", ("mfu",)),
    ("router: auxiliary loss", ("aux_loss",)),
    ("router: load of an expert, 1 = even", ("expert_load_max", "expert_load_min")),
    ("token accuracy", ("mean_token_accuracy", "eval_token_accuracy")),
    ("reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; an empty list if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# Dense bfloat16 TFLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts.
_PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "H200": 989, "H800": 989, "B200": 2250, "B300": 2250,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10": 125,
}  # fmt: skip


def peak_tflops(device: str) -> float | None:
    """The peak of a GPU in dense bfloat16 by its name as CUDA gives it; None if it is not known."""
    return next((float(peak) for name, peak in _PEAK_TFLOPS.items() if name in device), None)


def metrics_log(path: Path, recipe: TrainRecipe, *, resumed: bool) -> "TrainerCallback":
    """A callback that appends every logged dict to a JSONL file, on rank 0, with measurements of its own.

    It adds these to the logged dict in place, so it must come before other callbacks (see `add_metrics_log`):

    - `tokens_per_second`: tokens of all processes, without padding, over the time since the last row, without
      evaluations and checkpoints; `tokens_per_second_per_device`: the same over the number of processes.
    - `mfu`: the share of the GPUs' peak that the model's FLOPs take (PaLM, arXiv 2204.02311, appendix B). A token of
      LoRA training has a forward pass and the backward pass through frozen weights, which takes as much;
      recomputation does not count. Only in bfloat16 on GPUs whose peak is known.
    - `expert_load_max`, `expert_load_min`: the share of token-expert pairs of the busiest and the idlest expert of a
      layer, times the number of experts, averaged over layers; padding counts.
    """
    from transformers import TrainerCallback

    class MetricsLog(TrainerCallback):
        def __init__(self) -> None:
            self._load = _ExpertLoad()
            self._tokens = 0.0
            self._row_at = self._trained_at = time.monotonic()
            self._paused = 0.0  # seconds of evaluations and checkpoints since the last row
            self._step = 0  # of the last row

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._load.watch(model)
            self._row_at = self._trained_at = time.monotonic()
            self._step = state.global_step
            if not state.is_world_process_zero:
                return
            # A killed run may have logged steps beyond its last checkpoint; they will be repeated.
            done = [row for row in read_rows(path) if resumed and row["step"] <= state.global_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in done))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._trained_at = time.monotonic()

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._add_pause()
            self._load.clear()  # counts of held-out data

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._add_pause()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                now = time.monotonic()
                tokens = logs.get("num_tokens", 0.0)
                logs["tokens_per_second"] = round((tokens - self._tokens) / (now - self._row_at - self._paused), 1)
                each = logs["tokens_per_second_per_device"] = round(logs["tokens_per_second"] / args.world_size, 1)
                examples = recipe.optimizer.batch_size * max(1, state.global_step - self._step)
                logs |= _mfu(recipe, each, (tokens - self._tokens) / examples)
                self._step = state.global_step
                self._tokens, self._row_at, self._trained_at, self._paused = tokens, now, now, 0.0
                logs |= self._load.take()
            if state.is_world_process_zero:
                row = {"step": state.global_step, "time": round(time.time(), 3)}
                row |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._load.remove_hooks()

        def _add_pause(self) -> None:
            now = time.monotonic()
            self._paused += now - self._trained_at
            self._trained_at = now

    return MetricsLog()


@cache
def _shape(base: Path) -> Shape:
    """The base's sizes, read once a run and not at each row of the log."""
    return family_of(base).shape(read_json(base / "config.json"))


def _mfu(recipe: TrainRecipe, tokens_per_second: float, sequence: float) -> dict[str, float]:
    """`{"mfu": share}` of one device, or nothing where its peak is not known.

    Args:
        recipe: The run's recipe.
        tokens_per_second: Of this device.
        sequence: Tokens of an example, on average.
    """
    import torch

    if recipe.dtype != "bfloat16" or not torch.cuda.is_available():
        return {}
    peak = peak_tflops(torch.cuda.get_device_name())
    if peak is None:
        return {}
    flops = 2 * forward_flops(_shape(recipe.base), sequence)
    return {"mfu": round(tokens_per_second * flops / (peak * 1e12), 4)}


class _ExpertLoad:
    """Counts the tokens routed to each expert of each layer, on the device, by hooks on the routers."""

    def __init__(self) -> None:
        self._counts: dict[str, Any] = {}
        self._hooks: list[Any] = []

    def watch(self, model: Any) -> None:
        import torch

        from mixfuse.train.model.family_classes import router_classes

        def hook(name: str) -> Any:
            def count(router: Any, _: Any, output: Any) -> None:
                counts_E = torch.bincount(output[2].detach().flatten(), minlength=router.num_experts)  # noqa: N806
                self._counts[name] = counts_E + self._counts[name] if name in self._counts else counts_E

            return count

        for name, module in model.named_modules():
            if isinstance(module, router_classes()):
                self._hooks.append(module.register_forward_hook(hook(name)))

    def take(self) -> dict[str, float]:
        """The load since the last call, over all processes, each of which must call; empty without routers."""
        import torch

        if not self._counts:
            return {}
        counts_LE = torch.stack(list(self._counts.values())).double()  # noqa: N806 - layers, experts
        self.clear()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(counts_LE)
        load_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True)  # noqa: N806
        return {
            "expert_load_max": round(float(load_LE.amax(dim=1).mean()), 4),
            "expert_load_min": round(float(load_LE.amin(dim=1).mean()), 4),
        }

    def clear(self) -> None:
        self._counts.clear()

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def add_metrics_log(trainer: Any, recipe: TrainRecipe, *, resumed: bool) -> None:
    """Puts the metrics callback before the trainer's others, so that they log its measurements too."""
    log = metrics_log(recipe.out / "metrics.jsonl", recipe, resumed=resumed)
    trainer.callback_handler.callbacks.insert(0, log)


def draw(out: Path) -> None:
    """Draws `metrics.jsonl` as `metrics.png`, a plot for each entry of `PLOTS` that was logged.

    Args:
        out: The run's folder. Without rows nothing is drawn.
    """
    rows = read_rows(out / "metrics.jsonl")
    panels = [(title, series) for title, keys in PLOTS if (series := _series(rows, keys))]
    if panels:
        plots.save(plots.curves(panels), out / "metrics.png")


def _series(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    logged = {key: [row for row in rows if key in row] for key in keys}
    return {key: ([r["step"] for r in own], [r[key] for r in own]) for key, own in logged.items() if own}


def start_wandb(recipe: TrainRecipe, *, resumed: bool) -> None:
    """Starts the Weights & Biases run on rank 0, before transformers would; a resumed run continues its own.

    The run's files are in `OUT/wandb`; `wandb sync` uploads a run that was written offline.

    Raises:
        MixfuseError: It cannot start: no key, no network, or no such project.
    """
    if recipe.wandb == "disabled" or os.environ.get("RANK", "0") != "0":
        return
    import wandb

    name = recipe.out / "wandb" / "run-id"
    run_id = name.read_text(encoding="utf-8").strip() if resumed and name.is_file() else secrets.token_hex(4)
    write_text(name, run_id + "\n")
    try:
        wandb.init(
            project=recipe.wandb_project,
            entity=recipe.wandb_entity,
            name=recipe.out.name,
            id=run_id,
            resume="allow" if recipe.wandb == "online" else None,  # offline, the same id joins the parts
            dir=str(recipe.out),
            mode=recipe.wandb,
            config={"recipe": recipe.model_dump(mode="json")},
        )
    except wandb.Error as error:
        raise MixfuseError(
            f"wandb: {recipe.wandb}: {error}; log in with `wandb login`, or write wandb: offline"
        ) from None


def end_wandb(*, failed: bool = False) -> None:
    """Flushes and ends the Weights & Biases run, if one is open in this process."""
    import sys

    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
