"""Which adapters the parity rule tells apart in each number format, against float32, on fake-quantised weights.

Launch:   python benchmarks/formats.py [--base runs/base | --tiny] [--layers 6] [--std 0.015] [--json]
Hardware: 2 CPU cores, 4 GB of memory for 6 layers of the embedded base; five minutes.

An adapter of random factors is served in float32, in bfloat16, and in bfloat16 on weights that were rounded to FP8
(E4M3, a scale for each matrix) or to 4 bits (groups of 64, symmetric). As in an engine, the adapter's products are
added to those of the rounded weights. bfloat16 is emulated: what a product, a sum or an activation makes is rounded.
Beside the right adapter, wrong ones are served: its experts dropped, its alpha doubled, another revision (0.3 of other
factors added), and one layer's experts swapped. Each is judged twice by `contracts/agreement.py`: against the float32
answers on the base's own weights, as the first `adapter verify` does; and against what an engine of the same format
said of the right adapter, as a swap does once the adapter was verified there. Printed: the fault that is found, or
"passes".
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mixfuse.contracts import agreement
from mixfuse.contracts.adapter import PARITY_TOLERANCE
from mixfuse.contracts.agreement import Answers, Comparison
from mixfuse.train.adapters.parity import probe_prompts, repeated_prompts
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.tokenizer import load_tokenizer

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Weight → B and A, of each expert where it holds several."""
RANK = 8
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "experts.")
WRONG = ("experts dropped", "alpha doubled", "another revision", "a layer's experts swapped")


def fp8(weight: torch.Tensor) -> torch.Tensor:
    """A matrix rounded to FP8 (E4M3) with one scale."""
    scale = weight.abs().amax() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int4(weight: torch.Tensor, group: int = 64) -> torch.Tensor:
    """A matrix rounded to 4 bits, with a scale for each group.

    Groups of 32 with a zero point would change nothing in the embedded base, whose weights come from such a format.
    """
    groups = weight.reshape(-1, group)
    step = (groups.abs().amax(1, keepdim=True) / 7).clamp(min=1e-8)
    return ((groups / step).round().clamp(-8, 7) * step).reshape(weight.shape)


def bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Float32 values rounded to bfloat16."""
    return values.bfloat16().float()


class InBfloat16(TorchDispatchMode):
    """Rounds the float32 results of products, sums and activations to bfloat16 while it is active."""

    _ROUNDED = ("mm", "addmm", "bmm", "_grouped_mm", "add", "add_", "mul", "silu")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Makes the call, and rounds."""
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        rounds = name in self._ROUNDED or name.startswith("_scaled_dot_product")
        if not rounds:
            return made
        return tuple(map(self._rounded, made)) if isinstance(made, tuple) else self._rounded(made)

    @staticmethod
    def _rounded(made: Any) -> Any:
        return bfloat16(made) if isinstance(made, torch.Tensor) and made.dtype == torch.float32 else made


FORMATS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "float32": (False, lambda weight: weight),
    "bfloat16": (True, lambda weight: weight),
    "bfloat16 fp8": (True, fp8),
    "bfloat16 int4": (True, int4),
}
"""Name → whether it computes in bfloat16, and what becomes of a weight."""


class Model:
    """A base whose weights are replaced by those of a format, with an adapter added."""

    def __init__(self, base: Path, layers: int | None) -> None:
        sizes = {"num_hidden_layers": layers} if layers else {}
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **sizes).eval()
        self._parameters = dict(self._model.named_parameters())
        self.weights = {
            name: weight.detach().clone()
            for name, weight in self._parameters.items()
            if any(part in name for part in ADAPTED)
        }
        tokenizer = load_tokenizer(base)
        self.prompts = probe_prompts(tokenizer, 128) + repeated_prompts(tokenizer)
        lengths = sorted(set(map(len, self.prompts)))
        alike = [[n for n, prompt in enumerate(self.prompts) if len(prompt) == length] for length in lengths]
        self._batches = [numbers[start : start + 24] for numbers in alike for start in range(0, len(numbers), 24)]

    def factors(self, seed: int, std: float) -> Factors:
        """Random factors of every weight."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (
                torch.randn(*weight.shape[:-1], RANK, generator=generator) * std,
                torch.randn(*weight.shape[:-2], RANK, weight.shape[-1], generator=generator) / weight.shape[-1] ** 0.5,
            )
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def said(self, format_: str, factors: Factors | None) -> list[list[float]]:
        """The log-probabilities of the prompts."""
        in_bfloat16, rounded = FORMATS[format_]
        kept = bfloat16 if in_bfloat16 else lambda values: values
        for name, weight in self.weights.items():
            served = torch.stack([rounded(one) for one in weight]) if weight.dim() == 3 else rounded(weight)
            if in_bfloat16:
                served = bfloat16(served)
            if factors is not None:
                served = served + kept(factors[name][0]) @ kept(factors[name][1])
            self._parameters[name].copy_(served)
        rows: dict[int, list[float]] = {}
        for numbers in self._batches:
            ids = torch.tensor([self.prompts[number] for number in numbers])
            with InBfloat16() if in_bfloat16 else nullcontext():
                logits = self._model(input_ids=ids).logits[:, :-1]
            scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            rows.update(zip(numbers, scores.tolist(), strict=True))
        return [rows[number] for number in range(len(self.prompts))]


def wrong_ones(right: Factors, other: Factors, layer: int) -> dict[str, Factors]:
    """The right adapter, and wrong ones."""
    experts = {name: "experts." in name for name in right}
    here = {name for name in right if f"layers.{layer}." in name and experts[name]}
    return {
        "right": right,
        "experts dropped": {name: (0 * b if experts[name] else b, a) for name, (b, a) in right.items()},
        "alpha doubled": {name: (2 * b, a) for name, (b, a) in right.items()},
        "another revision": {name: (b + 0.3 * other[name][0], a) for name, (b, a) in right.items()},
        "a layer's experts swapped": {
            name: (b.roll(1, 0), a.roll(1, 0)) if name in here else (b, a) for name, (b, a) in right.items()
        },
    }


class Judged(NamedTuple):
    """One adapter in one format.

    Attributes:
        format_: The number format.
        adapter: Which adapter.
        reference: The fault against float32 answers on the base's own weights; None if it passes.
        measured: Against what the format said of the right adapter.
        found: The first comparison.
    """

    format_: str
    adapter: str
    reference: str | None
    measured: str | None
    found: Comparison


def faults(model: Model, std: float, layer: int, formats: Sequence[str] = tuple(FORMATS)) -> Iterator[Judged]:
    """What is found of each adapter in each format."""
    adapters = wrong_ones(model.factors(1, std), model.factors(2, std), layer)
    parts = (adapters["right"], None, adapters["experts dropped"])
    reference = Answers(*(model.said("float32", factors) for factors in parts))
    for format_ in formats:
        base = model.said(format_, None)
        measured = Answers(model.said(format_, adapters["right"]), base)
        tolerance = agreement.tolerance_in(format_, PARITY_TOLERANCE, base_known=True)
        for name, factors in adapters.items():
            said = measured if name == "right" else Answers(model.said(format_, factors), base)
            compared = [agreement.compare(one, said, model.prompts) for one in (reference, measured)]
            first, later = (agreement.fault(one, tolerance=tolerance) for one in compared)
            yield Judged(format_, name, first, later, compared[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("runs/base"), help="default: runs/base")
    parser.add_argument("--tiny", action="store_true", help="a random base of two layers instead")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--layers", type=int, default=6, help="use the first N layers (default: 6)")
    parser.add_argument("--std", type=float, help="of the factor B (default: 0.015, with --tiny 0.3)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            build(Path(folder) / "base", tiny=True)
        base = Path(folder) / "base" if arguments.tiny else arguments.base
        model = Model(base, None if arguments.tiny else arguments.layers)
    std = arguments.std or (0.3 if arguments.tiny else 0.015)
    layer = 1 if arguments.tiny else arguments.layers // 2
    rows: list[dict[str, Any]] = []
    for judged in faults(model, std, layer, arguments.formats):
        print(f"{judged.format_:14} {judged.adapter:26} base off by {judged.found.drift}")
        print(f"{'':41} shares {', '.join(map(str, judged.found.shares))}; rest {judged.found.rest}")
        for name in ("reference", "measured"):
            print(f"{'':41} {name}: {getattr(judged, name) or 'passes'}", flush=True)
        rows.append({name: str(value) if name == "found" else value for name, value in judged._asdict().items()})
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
