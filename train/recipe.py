"""The training recipes: one YAML a job, every key with its type and default here."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from mixfuse.recipe import Strict

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _role_name(value: str) -> str:
    if not value.replace("-", "").replace("_", "").isalnum():
        raise ValueError("a role's name is letters, digits, '-' and '_'")
    return value


RoleName = Annotated[str, AfterValidator(_role_name)]
Decay = Annotated[float, Field(ge=0, lt=1)]


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


class DataSource(Strict):
    """One data set: a file here, or a name on the Hugging Face Hub.

    Attributes:
        path: A `.jsonl` or `.parquet` file.
        hub: Instead of `path`: a data set's name on the Hub, as `datasets.load_dataset` takes it.
        subset: Of a data set on the Hub that has several configurations: which.
        split: Of a data set on the Hub: which split.
        weight: How many of the examples are drawn from this set, in proportion to the other sets' weights. A pass over
            the data ends when every set has been read once; small sets of great weight are then read again.
        format: How a row holds a chat: `messages` ([{role, content}]), `sharegpt` (`conversations`: [{from, value}]) or
            `prompt_completion` (two strings); `auto` sees it by the row's keys. Preference pairs have one format.
    """

    path: Path | None = None
    hub: str | None = Field(default=None, min_length=1)
    subset: str | None = None
    split: str = "train"
    weight: PositiveFloat = 1.0
    format: Literal["auto", "messages", "sharegpt", "prompt_completion"] = "auto"

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of 'path' (a .jsonl or .parquet file) and 'hub' (a data set on the Hub)")
        if self.path is not None and not self.model_fields_set.isdisjoint({"subset", "split"}):
            raise ValueError("'subset' and 'split' go with 'hub'; a file is read whole")
        return self

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.hub is None else f"{self.hub} ({self.split})"


def _sources(value: Any) -> Any:
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    if not entries:
        raise ValueError("names no data set")
    return tuple({"path": entry} if isinstance(entry, (str, Path)) else entry for entry in entries)


Data = Annotated[tuple[DataSource, ...], BeforeValidator(_sources)]
"""A path, or a list of paths and of `{path | hub, weight, …}`."""


class Optimizer(Strict):
    """How AdamW trains it. Batches are counted over all processes, so a recipe means the same on any number of them.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples a step, over all processes; a multiple of micro_batch * processes. With `packing`, an
            example is a packed row.
        micro_batch: Examples a forward pass, on one process.
        learning_rate: Peak, after the warm-up.
        min_learning_rate: Where a cosine schedule ends.
        warmup_steps: Steps in which the rate rises to its peak.
        warmup_ratio: Instead of `warmup_steps`: their share of `steps`.
        schedule: From the peak on: held, or down to zero (or `min_learning_rate`) in a line or a half cosine.
        betas: Decay of Adam's first and second moment.
        eps: Adam's ε. With gradients below 1e-8 (a long accumulation in bfloat16) a smaller one helps.
        weight_decay: Decoupled (AdamW); not applied to biases and norms, of which LoRA has none.
        max_grad_norm: Gradient norms above are clipped.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 8
    micro_batch: PositiveInt = 4
    learning_rate: PositiveFloat = 2e-4
    min_learning_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_ratio is not None and "warmup_steps" in self.model_fields_set:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        if self.min_learning_rate and self.schedule != "cosine":
            raise ValueError(f"min_learning_rate is where a cosine ends; the schedule is {self.schedule!r}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self

    @property
    def warmup(self) -> int:
        """Steps of warm-up, of whichever key."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * self.steps)


class Evaluation(Strict):
    """The loss on held-out examples while it trains, and what follows from it.

    Attributes:
        data: The held-out examples; a path or a list, as the recipe's `data`.
        share: Instead of `data`: this share of the training data, by a hash of the prompt (or the pair's id), so that
            the same prompt never stands on both sides; it is not trained on.
        every: Steps between evaluations; there is one before the first step and one after the last, too.
        micro_batch: Examples a forward pass; by default the optimizer's.
        limit: At most so many examples, the first of them.
        patience: Stop after so many evaluations in a row that brought no better loss; unset: never.
        min_delta: A loss counts as better when it is lower by more than this.
        keep_best: The adapter that is saved is the one with the best loss, not the last one.
    """

    data: Data | None = None
    share: float | None = Field(default=None, gt=0, lt=1)
    every: PositiveInt = 50
    micro_batch: PositiveInt | None = None
    limit: PositiveInt | None = None
    patience: PositiveInt | None = None
    min_delta: float = Field(default=0.0, ge=0)
    keep_best: bool = True

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.data is None) == (self.share is None):
            raise ValueError("set exactly one of 'data' (held-out examples) and 'share' (of the training data)")
        if any(source.weight != 1 for source in self.data or ()):
            raise ValueError("evaluation reads every example once; leave 'weight' out")
        return self


class TrainRecipe(Strict):
    """What SFT and the judge have in common.

    Attributes:
        base: Folder of the base model.
        out: Folder of the run: `run.json`, `metrics.jsonl`, `metrics.png`, `adapter/` (PEFT), `checkpoints/`.
        role: The role the adapter is for.
        data: A `.jsonl` or `.parquet` file, or a list of files and Hub data sets with weights.
        data_processes: Processes that tokenise the data, on the first node.
        max_length: Tokens; what a longer example does is the stage's affair.
        lora: What is trained.
        optimizer: How it is trained.
        evaluation: Held-out loss, early stop, and the best adapter kept; unset: the last adapter is saved.
        attention: transformers' attention implementation; `auto` takes FlashAttention 2 where it is installed, the
            dtype is bfloat16 and there is a GPU, else sdpa.
        deepspeed: DeepSpeed's own JSON config; ZeRO stage 3.
        processes: To start on this node, where no launcher (torchrun, deepspeed, Slurm) has started the command.
        threads: CPU threads a process; by default the cores divided by `processes`.
        dtype: Of the base, the adapter and the activations.
        gradient_checkpointing: Keep only each layer's input for backward and compute the rest again: a third more
            computing for a fraction of the memory.
        save_every: Steps between checkpoints that a later run resumes from; 0 for none.
        log_every: Steps between rows of `metrics.jsonl`.
        seed: Of the adapter's start, dropout, the mixing and the order of the data.
        data_seed: Of the mixing and order of the data alone; by default `seed`.
        wandb: Weights & Biases mode; `metrics.jsonl` and `metrics.png` are written always.
        wandb_project: Weights & Biases project.
        wandb_entity: Weights & Biases team or user; by default the account's own.
    """

    base: Path
    out: Path
    role: RoleName
    data: Data
    data_processes: PositiveInt = 1
    max_length: PositiveInt = 1024
    lora: Lora = Lora()
    optimizer: Optimizer
    evaluation: Evaluation | None = None
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    deepspeed: Path
    processes: PositiveInt = 1
    threads: PositiveInt | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_every: int = Field(default=0, ge=0)
    log_every: PositiveInt = 1
    seed: int = 0
    data_seed: int | None = None
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "mixfuse"
    wandb_entity: str | None = None

    @property
    def order_seed(self) -> int:
        """The seed of the data's mixing and order."""
        return self.seed if self.data_seed is None else self.data_seed


class SftRecipe(TrainRecipe):
    """Supervised fine-tuning on chats: rows of `{id, messages: [...]}`, loss on what the assistant says.

    Attributes:
        loss_on: Every assistant turn of a chat, or the last one.
        truncation: What a chat longer than `max_length` does: it is dropped (and counted), loses its beginning (`left`)
            or its end (`right`), or is an error. One that has no token left to learn from is dropped.
        packing: Fill rows of `max_length` tokens with several whole chats, each of which attends to itself alone.
        router_aux_loss_coef: Weight of the load-balancing loss (Switch Transformers, arXiv 2101.03961, eq. 4-6).
    """

    role: RoleName = "domain"
    loss_on: Literal["all", "last"] = "all"
    truncation: Literal["drop", "left", "right", "error"] = "drop"
    packing: bool = False
    router_aux_loss_coef: float = Field(default=0.001, ge=0)


class JudgeRecipe(TrainRecipe):
    """DPO on verdicts: rows of `mixfuse pairs build`; the reference is the policy without the judge adapter.

    A pair longer than `max_length` in either order is left out: cut, it would lose its verdict.

    Attributes:
        beta: How strongly the policy is held to the reference (DPO, arXiv 2305.18290, eq. 7).
    """

    role: RoleName = "judge"
    beta: PositiveFloat = 0.1
