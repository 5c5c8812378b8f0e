"""ZeRO-3 beside expert parallelism for 8x22B on paper: bytes moved, time and memory on 1, 2 and 4 nodes of 8 H100.

    .venv/bin/python benchmarks/parallelism.py

ZeRO-3's figures are `mixfuse plan`'s for `configs/mixtral-8x22b/domain_sft.yaml`. Those of expert parallelism come from
the formulas in `docs/parallelism.md`, which shows this program's output. Nothing here is measured.
"""

from pathlib import Path
from typing import NamedTuple

from mixfuse.contracts.family import Shape, active_parameters
from mixfuse.contracts.files import read_json
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.planning import memory
from mixfuse.train.planning.training_plan import Hardware, Plan, forward_flops, plan, speed
from mixfuse.train.quantization import Quantization
from mixfuse.train.recipe import SftRecipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "mixtral-8x22b" / "domain_sft.yaml"
GPUS = 8
GPU_BYTES = 80 << 30
TFLOPS, UTILISATION = 989.0, 0.3
INSIDE, BETWEEN, OWN = 450e9, 50e9, 2000e9
"""Bytes a second that a GPU receives inside a node and between nodes, and reads and writes of its own memory."""
IMBALANCE = 1.5
"""Tokens of the busiest expert, in those of the average one: an assumption. Its GPU sets the pace of all."""


class Way(NamedTuple):
    """One way to hold the experts, in a micro step of each GPU.

    Attributes:
        inside: Bytes that a GPU receives inside its node.
        between: Bytes that it receives over the network.
        compute: Seconds of computing, with the unpacking of quantised experts.
        held: Bytes on a GPU at its peak.
        tokens: Tokens of all GPUs in the step.
    """

    inside: float
    between: float
    compute: float
    held: float
    tokens: int

    @property
    def moving(self) -> float:
        """Seconds that the bytes take."""
        return self.inside / INSIDE + self.between / BETWEEN

    def per_second(self, *, hidden: bool) -> float:
        """Tokens a second; `hidden`: moving and computing at the same time, as far as they can."""
        return self.tokens / (max(self.compute, self.moving) if hidden else self.compute + self.moving)


def zero3(planned: Plan) -> Way:
    """Every GPU gathers every expert in every pass; over several nodes, at the network's pace."""
    world, nodes = planned.hardware.world, planned.hardware.nodes
    moved = planned.gathered_numel * planned.w * (world - 1) / world
    estimate = speed(planned, tflops=TFLOPS, utilisation=UTILISATION, bandwidth=INSIDE, memory_bandwidth=OWN)
    tokens = world * planned.batch.T
    inside, between = (moved, 0.0) if nodes == 1 else (0.0, moved)
    return Way(inside, between, tokens / estimate.compute, planned.gpu_total, tokens)


def exchange_bytes(shape: Shape, tokens: int, w: int, *, passes: int) -> float:
    """Bytes that a GPU receives in a micro step: T·K·H·w·(e-1)/e for each of two exchanges, a layer and a pass.

    One exchange sends tokens to their experts and the other brings products back; backward, gradients go the same ways.
    """
    return 2 * passes * shape.L * tokens * shape.K * shape.H * w * (GPUS - 1) / GPUS


def experts_placed(planned: Plan, *, imbalance: float) -> Way:
    """Each GPU of a node holds E / 8 experts of every layer; the rest of the base stays under ZeRO-3."""
    shape, w, world = planned.shape, planned.w, planned.hardware.world
    passes = 2 + planned.checkpointing
    expert_weights = 3 * shape.L * shape.E * shape.H * shape.I
    packed = sum(planned.experts.elements(expert_weights).values()) * w
    rest = planned.base_bytes - packed
    gathered = passes * rest * (world - 1) / world
    exchanged = exchange_bytes(shape, planned.batch.T, w, passes=passes)
    forward = forward_flops(shape, planned.batch.S)
    of_experts = 2 * 3 * shape.L * shape.K * shape.H * shape.I  # of them, in a token's pass
    work = passes * planned.batch.T * (forward + (imbalance - 1) * of_experts) / (UTILISATION * TFLOPS * 1e12)
    unpacking = passes * planned.experts.unpacking_bytes() * expert_weights / GPUS / OWN
    # LoRA of an expert is where the expert is: a master weight, two moments, a gradient and the weight itself.
    factors = shape.L * shape.E * 16 * (2 * shape.H + 3 * shape.I)  # r = 16
    per_element = 2 * w + memory.FP32 + 8
    states = planned.held["master"] + planned.held["optimizer"] + planned.held["gradients"] + planned.held["lora"]
    attention_states = states - factors / world * per_element
    gathers = (
        2 * (memory.layer_parameters(shape, load(RECIPE, SftRecipe).lora) - memory.moe_block_parameters(shape)) * w
    )
    peak = planned.peak
    buffers = planned.held["persistent"] + planned.held["buckets"]
    held = packed / GPUS + rest / world + factors / GPUS * per_element + attention_states + buffers
    # The busiest GPU has as many more rows; the output layer stays gathered.
    head = shape.V * shape.H * w
    held += gathers + head + peak.activations + imbalance * peak.workspace
    inside, between = (gathered, 0.0) if planned.hardware.nodes == 1 else (0.0, gathered)
    return Way(inside + exchanged, between, work + unpacking, held, world * planned.batch.T)


def planned_for(nodes: int, kind: Quantization | None, rows: int = 4) -> Plan:
    """The recipe's plan on so many nodes, with so many rows of 4096 tokens in a pass."""
    recipe = load(RECIPE, SftRecipe)
    optimizer = recipe.optimizer.model_copy(update={"micro_batch": rows})
    recipe = recipe.model_copy(update={"quantization": kind, "optimizer": optimizer})
    config = read_json(RECIPE.parent / "model" / "config.json")
    hardware = Hardware(nodes=nodes, gpus=GPUS, gpu_bytes=GPU_BYTES, reserve_bytes=4 << 30)
    return plan(recipe, config, read_json(ROOT / recipe.deepspeed), hardware)


def main() -> None:
    """Prints the table."""
    first = planned_for(1, None)
    print(
        f"4 x 4096 tokens a pass and GPU; {first.base_parameters / 1e9:.1f} B parameters, "
        f"{active_parameters(first.shape) / 1e9:.1f} B active; busiest expert {IMBALANCE} of the average"
    )
    head = ("nodes", "experts", "", "GB in node", "GB between", "moving s", "computing s", "tokens/s", "GiB a GPU")
    row = "{:>5} {:8} {:20} {:>10} {:>10} {:>8} {:>11} {:>15} {:>9}"
    print(row.format(*head).rstrip())
    for nodes in (1, 2, 4):
        for kind in (None, "int8", "nf4"):
            planned = planned_for(nodes, kind)
            for name, way in ways_of(planned).items():
                figures = (f"{way.inside / 1e9:.0f}", f"{way.between / 1e9:.0f}", f"{way.moving:.1f}")
                print(
                    row.format(
                        *(nodes, kind or "bfloat16", name, *figures),
                        *(f"{way.compute:.1f}", pace(way), f"{way.held / 2**30:.1f}"),
                    )
                )
    print("\n2 nodes, bfloat16: tokens/s by the rows of 4096 tokens in a pass")
    for rows in (1, 2, 4, 8):
        ways = ways_of(planned_for(2, None, rows))
        print(f"{rows} rows: " + "; ".join(f"{name} {pace(way)}" for name, way in ways.items()))


def ways_of(planned: Plan) -> dict[str, Way]:
    """The ways that are compared, by name."""
    return {
        "ZeRO-3": zero3(planned),
        "parallel, even": experts_placed(planned, imbalance=1.0),
        "parallel, uneven": experts_placed(planned, imbalance=IMBALANCE),
    }


def pace(way: Way) -> str:
    """Tokens a second: if moving and computing take turns, and if they overlap."""
    return f"{way.per_second(hidden=False):,.0f} - {way.per_second(hidden=True):,.0f}"


if __name__ == "__main__":
    main()
