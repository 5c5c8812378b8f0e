"""Which adapters the parity rule tells apart in each number format, against float32, on fake-quantised weights.

Launch:   python benchmarks/formats.py [--base runs/base] [--layers 6] [--std 0.015] [--json]
Hardware: 2 CPU cores, 4 GB of memory for 6 layers of the embedded base; five minutes.

An adapter of random factors is served in float32, in bfloat16 (torch's autocast on a CPU), and in bfloat16 on weights
that were rounded to FP8 (E4M3, a scale for each matrix) or to 4 bits (groups of 32, with a zero point). Beside the
right one, wrong ones are served: its experts dropped, its alpha doubled, another revision (0.3 of other factors added),
and one layer's experts swapped. Each is judged twice by `contracts/agreement.py`: against the float32 answers on the
base's own weights, as the first `adapter verify` does; and against what an engine of the same format said of the right
adapter, as a swap does once the adapter was verified there. Printed: the fault that is found, or "passes".
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mixfuse.contracts import agreement
from mixfuse.contracts.adapter import PARITY_TOLERANCE
from mixfuse.contracts.agreement import Answers
from mixfuse.train.adapters.parity import probe_prompts
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


def int4(weight: torch.Tensor, group: int = 32) -> torch.Tensor:
    """A matrix rounded to 4 bits, with a scale and a zero point for each group."""
    groups = weight.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-8) / 15
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


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
        self.prompts = probe_prompts(load_tokenizer(base), 128)

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
        for name, weight in self.weights.items():
            coarse = torch.stack([rounded(one) for one in weight]) if weight.dim() == 3 else rounded(weight)
            self._parameters[name].copy_(coarse if factors is None else coarse + factors[name][0] @ factors[name][1])
        rows = []
        for prompt in self.prompts:
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                logits = self._model(input_ids=torch.tensor([prompt])).logits[0, :-1]
            scores = logits.float().log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])
            rows.append(scores[:, 0].tolist())
        return rows


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


def faults(model: Model, std: float, layer: int) -> Iterator[tuple[str, str, str | None, str | None]]:
    """(format, adapter, the fault against float32, the fault against what the format said) of each."""
    served = wrong_ones(model.factors(1, std), model.factors(2, std), layer)
    reference = Answers(
        model.said("float32", served["right"]),
        model.said("float32", None),
        model.said("float32", served["experts dropped"]),
    )
    for format_ in FORMATS:
        base = model.said(format_, None)
        measured = Answers(model.said(format_, served["right"]), base)
        tolerance = agreement.tolerance_in(format_, PARITY_TOLERANCE, base_known=True)
        for name, factors in served.items():
            answers = Answers(model.said(format_, factors), base)
            first = agreement.fault(*agreement.compare(reference, answers), tolerance=tolerance)
            later = agreement.fault(*agreement.compare(measured, answers), tolerance=tolerance)
            yield format_, name, first, later


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("runs/base"), help="default: runs/base")
    parser.add_argument("--layers", type=int, default=6, help="use the first N layers (default: 6)")
    parser.add_argument("--std", type=float, default=0.015, help="of the factor B (default: 0.015)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    model = Model(arguments.base, arguments.layers)
    for format_, name, first, later in faults(model, arguments.std, arguments.layers // 2):
        rows.append({"format": format_, "adapter": name, "reference": first, "measured": later})
        print(f"{format_:14} {name:26} against float32: {first or 'passes'}")
        print(f"{'':41} against the format: {later or 'passes'}", flush=True)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
