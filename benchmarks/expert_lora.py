"""What LoRA on experts costs beside LoRA on attention alone: PEFT's `target_parameters` and our expert LoRA.

    .venv/bin/python benchmarks/expert_lora.py [--base DIR] [--layers N] [--json] [--profile]

For batches of 2 x 128 and 4 x 256 tokens, ranks 8 and 16, with and without gradient checkpointing, it measures on the
embedded base (built where --base holds none):

- the step: forward, backward and AdamW (fused, as transformers' default); the methods take turns within each round, and
  the ratios are medians over rounds of ratios within a round;
- the bytes saved for backward: distinct storages that autograd keeps, parameters left out;
- the peak: the most bytes alive at once during forward and backward, above what was alive before.

The baseline is LoRA on q, k, v and o alone. For time it runs on whichever experts implementation is the fastest in a
first round: transformers' `eager` or `grouped_mm`, or this project's own without a LoRA; for memory on whichever saves
the least, or peaks lowest. PEFT gets the better of transformers' two in the same way. All share one set of weights.

With --layers N, by default 8, the first N layers take part, and the output layer works on N of 30 of the positions: it
is the same for all methods, and at its full size beside fewer layers it would flatter every ratio.

A step is timed by the process's CPU time with one thread (as configs/tiny trains, and not disturbed by other programs);
`--clock wall` takes the wall clock. Finished measurements are kept in --state and not made again.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MixtralForCausalLM

from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.contracts.files import read_json, write_json
from mixfuse.train.model import expert_lora

SHAPES = ((2, 128), (4, 256))
RANKS = (8, 16)
WHOLE = 30  # layers of the embedded base
OURS = expert_lora.EXPERTS_IMPLEMENTATION
CANDIDATES = {"attention": ("eager", "grouped_mm", OURS), "peft": ("eager", "grouped_mm"), "ours": (OURS,)}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    base = _base(arguments.base, arguments.layers)
    layers = base.config.num_hidden_layers
    what = f"{layers} layers, {arguments.threads} thread(s), {arguments.clock} time, {arguments.rounds} rounds"
    print(f"embedded base, {what}", flush=True)
    if arguments.profile:
        _profile(base, arguments)
        return
    state = read_json(arguments.state) if arguments.state.is_file() else {}
    rows = []
    for shape, rank, checkpointing in product(SHAPES, RANKS, (False, True)):
        key = f"{shape[0]}x{shape[1]} r={rank} {'checkpointing' if checkpointing else 'plain'}; {what}"
        if key not in state:
            state[key] = measure(base, shape, rank, checkpointing=checkpointing, rounds=arguments.rounds, clock=clock)
            write_json(arguments.state, state)
        rows.append(state[key])
        _print(key.partition(";")[0], state[key])
    if arguments.json:
        print(json.dumps(worst(rows) | {"setting": what, "measurements": rows}))


def measure(
    base: Any, shape: tuple[int, int], rank: int, *, checkpointing: bool, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One row of the table.

    Returns:
        Of each method the seconds of a step (`step`, and `optimizer` of that), `saved` and `peak` bytes, its experts
        `implementation`; and the ratios within rounds.
    """
    models: dict[str, Any] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, tuple[int, int]] = {}
    ids = torch.randint(5, 40000, shape, generator=torch.Generator().manual_seed(1))
    for method, implementations in CANDIDATES.items():
        first: dict[str, float] = {}
        saved, peaks = [], []
        for implementation in implementations:
            model = adapt(base, method, implementation, rank, checkpointing=checkpointing)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
            saved.append(saved_bytes(model, ids))  # warms, too
            peaks.append(peak_bytes(model, ids))
            first[implementation] = min(step(model, optimizer, ids, clock)[0] for _ in range(2))
            if first[implementation] == min(first.values()):
                models[method] = (model, optimizer, implementation)
        memory[method] = min(saved), min(peaks)
    for _ in range(rounds):
        for method, (model, optimizer, _) in models.items():
            seconds.setdefault(method, []).append(step(model, optimizer, ids, clock))

    def ratio(method: str, other: str, part: int = 0) -> float:
        pairs = zip(seconds[method], seconds[other], strict=True)
        return statistics.median(mine[part] / theirs[part] for mine, theirs in pairs)

    extra = {
        method: [mine - alone for mine, alone in zip(memory[method], memory["attention"], strict=True)]
        for method in ("peft", "ours")
    }
    return {
        "shape": list(shape),
        "rank": rank,
        "checkpointing": checkpointing,
        "methods": {
            method: {
                "implementation": models[method][2],
                "step": statistics.median(total for total, _ in times),
                "optimizer": statistics.median(part for _, part in times),
                "saved": memory[method][0],
                "peak": memory[method][1],
            }
            for method, times in seconds.items()
        },
        "step_vs_attention_only": ratio("ours", "attention"),
        "peft_step_vs_attention_only": ratio("peft", "attention"),
        "speedup_vs_peft": ratio("peft", "ours"),
        # Under checkpointing nothing but each layer's input is saved; and where the output layer makes the peak, no
        # method's experts do.
        "extra_saved_vs_peft": None if checkpointing else extra["ours"][0] / extra["peft"][0],
        "extra_peak_vs_peft": extra["ours"][1] / extra["peft"][1] if extra["peft"][1] > 0 else None,
    }


def worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each figure's worst over all rows; `extra_memory_vs_peft` is of the tensors saved for backward."""
    return {
        "step_vs_attention_only": max(row["step_vs_attention_only"] for row in rows),
        "speedup_vs_peft": min(row["speedup_vs_peft"] for row in rows),
        "extra_memory_vs_peft": max(row["extra_saved_vs_peft"] for row in rows if not row["checkpointing"]),
        "extra_peak_vs_peft": max(row["extra_peak_vs_peft"] or 0.0 for row in rows),
    }


def adapt(base: Any, method: str, implementation: str, rank: int, *, checkpointing: bool) -> Any:
    """A PEFT model around the shared base weights."""
    # Parameters that the copy finds in its memo are not copied.
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    model.set_experts_implementation(implementation)
    family = MIXTRAL
    experts = None if method == "attention" else list(family.expert_parameters)
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=list(family.attention), target_parameters=experts)
    if method == "ours":
        expert_lora.attach(config)
    model = get_peft_model(model, config).train()
    if method == "ours":
        expert_lora.assert_in_force(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)  # a fresh B is zero
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A loss over the last positions, as many as make the output layer's share that of the whole model."""
    keep = max(1, round(ids.shape[1] * model.config.num_hidden_layers / WHOLE))
    logits = model(input_ids=ids, logits_to_keep=keep).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, -keep:].flatten())


def step(model: Any, optimizer: Any, ids: torch.Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, and of the optimiser's part in it."""
    began = clock()
    loss_of(model, ids).backward()
    before = clock()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    now = clock()
    return now - began, now - before


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd holds between forward and backward, parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)
    del loss
    return sum(sizes.values())


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_real(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_real, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def peak_bytes(model: Any, ids: torch.Tensor) -> int:
    """The most bytes alive at once in forward and backward, LoRA gradients included, above those before."""
    with _Alive() as alive:
        loss_of(model, ids).backward()
    model.zero_grad(set_to_none=True)
    return alive.peak


def _print(name: str, row: dict[str, Any]) -> None:
    print(f"{name}:")
    for method, figures in row["methods"].items():
        megabytes = ", ".join(f"{part} {figures[part] / 2**20:.0f} MiB" for part in ("saved", "peak"))
        optimizer = f"{figures['optimizer']:.3f} s of it AdamW"
        print(f"  {method:9} {figures['step']:.3f} s ({optimizer}), {megabytes}; {figures['implementation']}")
    saved, peak = (
        "-" if row[key] is None else f"{row[key]:.3f}" for key in ("extra_saved_vs_peft", "extra_peak_vs_peft")
    )
    print(
        f"  step vs attention alone: ours {row['step_vs_attention_only']:.3f}, PEFT "
        f"{row['peft_step_vs_attention_only']:.3f}; speed-up over PEFT {row['speedup_vs_peft']:.2f}; "
        f"extra memory vs PEFT's extra: saved {saved}, peak {peak}",
        flush=True,
    )


def _profile(base: Any, arguments: argparse.Namespace) -> None:
    """Where our step's time goes, beside the attention-only step's on the same implementation: self CPU time by op."""
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(5, 40000, SHAPES[0], generator=torch.Generator().manual_seed(1))
    totals: list[dict[str, tuple[float, int]]] = []
    for method in ("attention", "ours"):
        model = adapt(base, method, OURS, 16, checkpointing=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        step(model, optimizer, ids, time.process_time)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            for _ in range(arguments.rounds):
                step(model, optimizer, ids, time.process_time)
        averages = profiler.key_averages()
        totals.append({e.key: (e.self_cpu_time_total / 1e3 / arguments.rounds, e.count) for e in averages})
    whole = sum(ms for ms, _ in totals[0].values())
    added = {name: totals[1][name][0] - totals[0].get(name, (0.0, 0))[0] for name in totals[1]}
    print(f"2x128, r=16: attention-only step {whole:.0f} ms; what ours adds, by operator (ms a step, share of that):")
    for name, ms in sorted(added.items(), key=lambda item: -item[1])[:14]:
        calls = (totals[1][name][1] - totals[0].get(name, (0.0, 0))[1]) // arguments.rounds
        print(f"  {name[:44]:44} {ms:8.1f} ms {ms / whole:7.2%}  {calls:5} more calls")


def _base(folder: Path | None, layers: int) -> Any:
    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary) / "base"
        if not (path / "config.json").is_file():
            from mixfuse.train.model.embedded_base import build

            build(path)
        expert_lora.register()
        model: Any = MixtralForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.use_cache = False
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the embedded base; built there where it is missing")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--state", type=Path, default=Path("runs/bench/expert_lora.json"), metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, the worst over all rows")
    parser.add_argument("--profile", action="store_true", help="what ours adds to a step, by operator")
    return parser.parse_args()


if __name__ == "__main__":
    main()
