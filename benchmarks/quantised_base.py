"""What a quantised base costs: losses of the same training on the base as it is, and with its experts in int8 and NF4.

    .venv/bin/python benchmarks/quantised_base.py [--base DIR] [--steps N] [--seeds N] [--json]

Trains LoRA on attention and all experts on the tasks of `configs/tiny/tasks.yaml`, for each seed three times from the
same adapter on the same batches. Prints the mean over the last ten steps, and the loss on held-out tasks (mean over the
answers' tokens) twice: on the base as it was trained on, and on the unquantised base, beside which it is served. Below
are the ratios to the unquantised arm of the same seed, with a 95 % interval (Student's t over the seeds). By
default the base is the random one of the tests; that of `mixfuse base build` shows what trained weights make of it.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from scipy.stats import t
from torch import Tensor

from mixfuse.contracts.families import family_of
from mixfuse.contracts.tasks import make
from mixfuse.train.data.loss_mask import IGNORED, Encoded, encode
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.quantization import Quantization
from mixfuse.train.recipe import Lora

TASKS = Path(__file__).parents[1] / "configs" / "tiny" / "tasks.yaml"
KINDS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
LAST = 10
"""Steps over which the loss at the end is averaged."""


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="quantised-base-") as folder:
        base = arguments.base or Path(folder) / "base"
        if not arguments.base:
            build(base, tiny=True)
        rows = [row for seed in range(arguments.seeds) for row in _runs(base, seed, arguments)]
    head = ("experts", f"last {LAST} steps", "held out", "beside the base", "before training")
    print(f"{arguments.steps} steps, {arguments.seeds} seeds, {arguments.dtype}: mean (standard deviation)")
    print(f"{head[0]:>15}" + "".join(f"{name:>24}" for name in head[1:]))
    keys = ("last", "heldout", "served", "untrained")
    for kind in KINDS:
        cells = [_spread([row[key] for row in rows if row["kind"] == kind]) for key in keys]
        print(f"{kind or f'{arguments.dtype} base':>15}" + "".join(f"{cell:>24}" for cell in cells))
    plain = {row["seed"]: row for row in rows if row["kind"] is None}
    for kind in KINDS[1:]:
        ratios = [_interval([r[key] / plain[r["seed"]][key] for r in rows if r["kind"] == kind]) for key in keys]
        print(f"{f'{kind}, ratio':>15}" + "".join(f"{cell:>24}" for cell in ratios))
    if arguments.json:
        print(json.dumps(rows))


def _runs(base: Path, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One seed's three runs."""
    tokenizer = load_tokenizer(base)
    chats = [task.chat()["messages"] for task in make(TASKS, "train", 400, seed=seed)]
    rows = [encode(chat, tokenizer, "all") for chat in chats]
    heldout = [encode(task.chat()["messages"], tokenizer, "all") for task in make(TASKS, "heldout", 64, seed=seed)]
    order = random.Random(seed)
    batches = [order.sample(rows, arguments.batch) for _ in range(arguments.steps)]
    found = []
    for kind in KINDS:
        model = _adapted(base, kind, seed, arguments)
        untrained = _heldout(model, heldout)
        losses = _train(model, batches, arguments.learning_rate)
        weights = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        row = {
            "seed": seed,
            "kind": kind,
            "untrained": untrained,
            "losses": losses,
            "heldout": _heldout(model, heldout),
        }
        served = model if kind is None else _adapted(base, None, seed, arguments)
        set_peft_model_state_dict(served, weights)
        row |= {"last": statistics.fmean(losses[-LAST:]), "served": _heldout(served, heldout)}
        print(f"seed {seed}, {kind or arguments.dtype}: held out {row['heldout']:.4f}", flush=True)
        found.append(row)
    return found


def _adapted(base: Path, kind: Quantization | None, seed: int, arguments: argparse.Namespace) -> Any:
    """The base with an untrained adapter, which depends on the seed alone."""
    model = load_base(base, getattr(torch, arguments.dtype), quantization=kind)
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(family_of(base), Lora(r=8, alpha=16)))


def _train(model: Any, batches: Sequence[Sequence[Encoded]], rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        total, count = _loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total) / count)
    return losses


@torch.no_grad()
def _heldout(model: Any, rows: Sequence[Encoded]) -> float:
    parts = [_loss(model, rows[start : start + 8]) for start in range(0, len(rows), 8)]
    return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)


def _loss(model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
    """The negative log-likelihood of the answers' tokens, summed, in nats; and how many they are."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((labels[:, 1:] != IGNORED).sum())


def _spread(values: Sequence[float]) -> str:
    deviation = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _interval(ratios: Sequence[float]) -> str:
    """The mean, with its 95 % interval by Student's t if there are several."""
    mean = statistics.fmean(ratios)
    if len(ratios) == 1:
        return f"{mean:.4f}"
    half = float(t.ppf(0.975, len(ratios) - 1)) * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the base model; by default the random one of the tests")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON list on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
