"""The training recipes: one YAML a job, every key with its type and default here."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from mixfuse.recipe import Strict

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _role_name(value: str) -> str:
    if not value.replace("-", "").replace("_", "").isalnum():
        raise ValueError("a role's name is letters, digits, '-' and '_'")
    return value


RoleName = Annotated[str, AfterValidator(_role_name)]


class Lora(Strict):
    """What is trained. The router is always frozen: vLLM serves no router adapter.

    Attributes:
        r: Rank, of attention and of every expert.
        alpha: Scaling numerator; the adapter is scaled by alpha / r.
        attention: Train q, k, v and o.
        experts: Train every expert's gate, up and down projection.
    """

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    attention: bool = True
    experts: bool = True

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("set attention or experts (or both) to true, otherwise nothing is trained")
        return self


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
