"""The training recipes: one YAML a job, every key with its type and default here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mixfuse.errors import MixfuseError
from mixfuse.recipe import Strict

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _role_name(value: str) -> str:
    if not value.replace("-", "").replace("_", "").isalnum():
        raise ValueError("a role's name is letters, digits, '-' and '_'")
    return value


RoleName = Annotated[str, AfterValidator(_role_name)]


class Lora(Strict):
    """What is trained. The router stays frozen: vLLM serves no router adapter.

    Attributes:
        r: Rank, of attention and of every adapted expert.
        alpha: Scaling numerator: the adapter is scaled by alpha / r.
        rslora: Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
        dropout: Share of the adapter's inputs that are zeroed in training, on attention and experts.
        attention: Train q, k, v and o.
        experts: Whose gate, up and down projections are trained: `all`, `none`, `{layer: [expert, …]}` (a layer that is
            not named has none), or `auto`: in each layer the fewest that carry `expert_share` of the gate weight over
            a sample of the data (ESFT, arXiv 2407.01906); see `train/experts.py`.
        expert_share: For `auto`: the share of a layer's gate weight that its chosen experts carry.
        expert_sample: For `auto`: how many rows of the data the base is run over, drawn with the recipe's seed.
        router: Refused when true.
    """

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention: bool = True
    experts: Literal["all", "none", "auto"] | dict[int, tuple[int, ...]] = "all"
    expert_share: float = Field(default=0.8, gt=0, le=1)
    expert_sample: PositiveInt = 64
    router: bool = False

    @field_validator("experts", mode="before")
    @classmethod
    def _experts(cls, value: Any) -> Any:
        """Puts a dict in order; says in one line what else there is to write."""
        if isinstance(value, str) and value in ("all", "none", "auto"):
            return value
        if not isinstance(value, dict):
            raise ValueError("is all, none, auto or {layer: [expert, ...]}")
        chosen: dict[int, tuple[int, ...]] = {}
        for layer, experts in value.items():
            # A recipe that was written as JSON has text for keys.
            number = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
            if not _is_number(number):
                raise ValueError(f"a layer is a number from 0 on, not {layer!r}")
            if not isinstance(experts, (list, tuple)) or not experts or not all(map(_is_number, experts)):
                raise ValueError(
                    f"layer {layer} needs a list of expert numbers, not {experts!r}; leave a layer without experts out"
                )
            chosen[number] = tuple(sorted(set(experts)))
        if not chosen:
            raise ValueError("names no layer; write none to train no experts")
        return dict(sorted(chosen.items()))

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if self.router:
            raise ValueError(
                "lora.router: the router cannot be trained: vLLM serves no adapter of Mixtral's router, it would "
                "be dropped in silence; leave it out"
            )
        if not self.attention and self.experts == "none":
            raise ValueError("set lora.attention to true or lora.experts to all, otherwise nothing is trained")
        return self

    def chosen(self, layers: int, experts: int) -> tuple[tuple[int, ...], ...]:
        """The experts to adapt, layer by layer, on a base of that size; `auto` counts as all of them, its upper bound.

        Raises:
            MixfuseError: A layer or expert is named that the base does not have.
        """
        if not isinstance(self.experts, dict):
            return ((() if self.experts == "none" else tuple(range(experts))),) * layers
        for layer, numbers in self.experts.items():
            if layer >= layers or numbers[-1] >= experts:
                raise MixfuseError(
                    f"lora.experts: layer {layer}, experts {list(numbers)}: the base has layers 0 to {layers - 1} with "
                    f"experts 0 to {experts - 1}"
                )
        return tuple(self.experts.get(layer, ()) for layer in range(layers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class LoraParameters(NamedTuple):
    """Trainable parameters of one layer.

    Attributes:
        attention: In q, k, v and o.
        experts: In the adapted experts' gate, up and down projections; gate and up share A.
    """

    attention: int
    experts: int


def lora_parameters(
    config: Mapping[str, Any], lora: Lora, chosen: Sequence[Sequence[int]] | None = None
) -> list[LoraParameters]:
    """Counts a recipe's trainable parameters, layer by layer.

    Args:
        config: A Mixtral's `config.json`.
        lora: What is trained.
        chosen: The experts that are adapted in each layer; by default `lora.chosen`, which takes `auto` for all.
    """
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, int(config["num_key_value_heads"]) * head_dim
    if chosen is None:
        chosen = lora.chosen(int(config["num_hidden_layers"]), int(config["num_local_experts"]))
    attention = lora.r * (2 * (hidden + queries) + 2 * (hidden + keys)) if lora.attention else 0
    expert = lora.r * (hidden + 2 * inner) + lora.r * (inner + hidden)
    return [LoraParameters(attention, expert * len(experts)) for experts in chosen]


class Optimizer(Strict):
    """How it is trained. Batches are counted over all processes, so a recipe means the same on any number of them.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples a step, over all processes; a multiple of micro_batch * processes.
        micro_batch: Examples a forward pass, on one process.
        learning_rate: Peak, after `warmup_steps`.
        schedule: From the peak on: held, or down to zero in a line or a half cosine.
        max_grad_norm: Gradient norms above are clipped.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 8
    micro_batch: PositiveInt = 4
    learning_rate: PositiveFloat = 2e-4
    warmup_steps: int = Field(default=10, ge=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0


class TrainRecipe(Strict):
    """What SFT and the judge have in common.

    Attributes:
        base: Folder of the base model.
        out: Folder of the run: `run.json`, `metrics.jsonl`, `adapter/` (PEFT), `checkpoints/`.
        role: The role the adapter is for.
        data: JSONL file.
        max_length: Tokens; what a longer example does is the stage's affair.
        deepspeed: DeepSpeed's own JSON config; ZeRO stage 3.
        processes: To start on this node, where no launcher (torchrun, deepspeed, Slurm) has started the command.
        threads: CPU threads a process; by default the cores divided by `processes`.
        save_every: Steps between checkpoints that a later run resumes from; 0 for none.
        wandb: Weights & Biases mode; `metrics.jsonl` is written always.
    """

    base: Path
    out: Path
    role: RoleName
    data: Path
    max_length: PositiveInt = 1024
    lora: Lora = Lora()
    optimizer: Optimizer
    deepspeed: Path
    processes: PositiveInt = 1
    threads: PositiveInt | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_every: int = Field(default=0, ge=0)
    log_every: PositiveInt = 1
    seed: int = 0
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "mixfuse"


class SftRecipe(TrainRecipe):
    """Supervised fine-tuning on chats: rows of `{id, messages: [...]}`, loss on the last assistant message.

    Attributes:
        router_aux_loss_coef: Weight of the load-balancing loss (Switch Transformers, arXiv 2101.03961, eq. 4-6).
    """

    role: RoleName = "domain"
    router_aux_loss_coef: float = Field(default=0.001, ge=0)


class JudgeRecipe(TrainRecipe):
    """DPO on verdicts: rows of `mixfuse pairs build`; the reference is the policy without the judge adapter.

    Attributes:
        beta: How strongly the policy is held to the reference (DPO, arXiv 2305.18290, eq. 7).
    """

    role: RoleName = "judge"
    beta: PositiveFloat = 0.1
