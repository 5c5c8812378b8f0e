"""The training recipes: one YAML file a run. Every key is here, with its type and default."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mixfuse.contracts.adapter import check_role_name
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.paths import FilePath
from mixfuse.contracts.strict_yaml import Strict, override, read_mapping, validate
from mixfuse.train.optimizers import OPTIMIZERS, OptimizerEntry, OptimizerName
from mixfuse.train.quantization import Quantization

RoleName = Annotated[str, AfterValidator(check_role_name)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Lora(Strict):
    """What is trained. The router stays frozen, because vLLM serves no adapter of it.

    Attributes:
        r: Rank, of attention and of every adapted expert.
        alpha: Scaling numerator: the adapter is scaled by alpha / r.
        rslora: Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
        dropout: Share of the adapter's inputs that are zeroed in training, in attention and experts.
        attention: Train q, k, v and o.
        experts: The experts whose gate, up and down projections are trained: `all`, `none`, `{layer: [expert, …]}` (a
            layer that is not named has none), or `auto`: in each layer the fewest that carry `expert_share` of the gate
            weight over a sample of the data (ESFT, arXiv 2407.01906); see `train/model/choose_experts.py`.
        expert_share: For `auto`: the share of a layer's gate weight that its chosen experts carry.
        expert_sample: For `auto`: number of rows in that sample, drawn with the recipe's seed.
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
        """Sorts a dict, and replaces pydantic's errors by one line."""
        if isinstance(value, str) and value in ("all", "none", "auto"):
            return value
        if not isinstance(value, dict):
            raise ValueError("is all, none, auto or {layer: [expert, ...]}")
        chosen: dict[int, tuple[int, ...]] = {}
        for layer, experts in value.items():
            # In a recipe that was written as JSON, keys are text.
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
                "lora.router: the router cannot be trained: vLLM serves no adapter of a router, it would "
                "be dropped in silence; leave it out"
            )
        if not self.attention and self.experts == "none":
            raise ValueError("set lora.attention to true or lora.experts to all, otherwise nothing is trained")
        return self

    def chosen(self, layers: int, experts: int) -> tuple[tuple[int, ...], ...]:
        """The experts to adapt in each layer of a base of that size; `auto` counts as all of them, its upper bound.

        Raises:
            MixfuseError: The base does not have a named layer or expert.
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
        config: The base's `config.json`.
        lora: The recipe's `lora`.
        chosen: The adapted experts of each layer; by default `lora.chosen`, which counts `auto` as all.
    """
    shape = shape_of(config)
    hidden, inner = shape.H, shape.I
    queries, keys = shape.A * shape.D, shape.G * shape.D
    if chosen is None:
        chosen = lora.chosen(shape.L, shape.E)
    attention = lora.r * (2 * (hidden + queries) + 2 * (hidden + keys)) if lora.attention else 0
    expert = lora.r * (hidden + 2 * inner) + lora.r * (inner + hidden)
    return [LoraParameters(attention, expert * len(experts)) for experts in chosen]


class Parallel(Strict):
    """What the processes divide besides ZeRO-3's weights.

    Attributes:
        sequences: So many processes in a row divide each chat (Ulysses, arXiv 2309.14509) and count as one in
            `batch_size`; it divides the number of processes. 1: none. SFT alone; see `docs/parallelism.md`.
    """

    sequences: PositiveInt = 1


SEQUENCE_ATTENTION = ("flash_attention_3", "flash_attention_2", "varlen")
"""Implementations that find chats by their boundaries; the others' masks are dropped by DeepSpeed's Ulysses."""
_EXPERTS_NOT_BUILT = (
    "parallel.experts: training is under ZeRO-3 alone (docs/parallelism.md); by its calculation, ZeRO-3 that gathers "
    "ahead is as fast on 8x22B, and faster where a router is uneven; leave it out, and fill the passes "
    "(optimizer.micro_batch)"
)
_NO_SEQUENCES = (
    "parallel.sequences: is for SFT; the judge's loss is of one position of a whole prompt (docs/parallelism.md); "
    "leave it out, and lower max_length or optimizer.micro_batch, or set gradient_checkpointing"
)


class DataSource(Strict):
    """One data set: a local file, or a name on the Hugging Face Hub.

    Attributes:
        path: A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`, or one of them packed as `.gz`), a folder of such
            files, or a pattern such as `data/train-*.parquet`.
        hub: Instead of `path`: a data set's name on the Hub, as `datasets.load_dataset` takes it.
        subset: The configuration, for a data set on the Hub that has several.
        split: The split of a data set on the Hub.
        weight: Examples are drawn from the sets in proportion to their weights. A pass over the data ends when every
            set has been read once; a small set with a large weight is read several times.
        format: How a row holds a chat: `messages` ([{role, content}]), `sharegpt` (`conversations`: [{from, value}]),
            `alpaca` (instruction, input, output) or `prompt_completion` (texts or messages); `auto` tells by the row's
            keys. `docs/data.md` shows them.
        licence: The licence, as the data's owner states it. The adapter's manifest repeats it.
    """

    path: FilePath | None = None
    hub: str | None = Field(default=None, min_length=1)
    subset: str | None = None
    split: str = "train"
    weight: PositiveFloat = 1.0
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    licence: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of 'path' (a file or a folder) and 'hub' (a data set on the Hub)")
        if self.path is not None and not self.model_fields_set.isdisjoint({"subset", "split"}):
            raise ValueError("'subset' and 'split' go with 'hub'; a file is read whole")
        return self

    @property
    def name(self) -> str:
        """The name in messages."""
        return str(self.path) if self.hub is None else f"{self.hub} ({self.split})"


def _sources(value: Any) -> Any:
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    if not entries:
        raise ValueError("names no data set")
    return tuple({"path": entry} if isinstance(entry, (str, Path)) else entry for entry in entries)


Data = Annotated[tuple[DataSource, ...], BeforeValidator(_sources)]
"""A path, or a list of paths and of `{path | hub, weight, …}`."""


class Optimizer(Strict):
    """How it is trained. Batches are counted over all processes, so a recipe means the same on any number of them.

    Attributes:
        name: The optimizer. AdamW is what every recipe here was tuned with; the others keep less state.
        steps: Optimiser steps; with `epochs`, the most of them.
        epochs: Passes over the training data, instead of `steps` or beside it; the run ends with whichever comes first.
        batch_size: Examples a step, over all processes; a multiple of micro_batch * processes / parallel.sequences.
            With `packing`, an example is a packed row.
        micro_batch: Examples a forward pass, on one process, or on those that divide its rows.
        learning_rate: The peak rate, after the warm-up.
        min_learning_rate: The final rate of a cosine schedule.
        warmup_steps: Steps in which the rate rises to its peak. Left out, it is at most a fifth of the run's steps.
        warmup_ratio: Warm-up steps as a share of the run's steps, instead of `warmup_steps`.
        schedule: After the peak: constant, or down to zero (or `min_learning_rate`) in a line or a half cosine.
        betas: AdamW: decay rates of the first and the second moment.
        eps: AdamW: ε. For gradients below 1e-8 (a long accumulation in bfloat16) a smaller one helps.
        weight_decay: Decoupled for AdamW, L2 for SGD; not applied to biases and norms, of which LoRA has none.
        max_grad_norm: Larger gradient norms are clipped to this.
    """

    name: OptimizerName = "adamw"
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
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
        if self.steps is None and self.epochs is None:
            raise ValueError("set steps (optimiser steps), epochs (passes over the data), or both")
        if self.warmup_ratio is not None and "warmup_steps" in self.model_fields_set:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        if self.min_learning_rate and self.schedule != "cosine":
            raise ValueError(f"min_learning_rate is where a cosine ends; the schedule is {self.schedule!r}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        adam_keys = sorted({"betas", "eps"} & self.model_fields_set)
        if adam_keys and not self.entry.adam_keys:
            raise ValueError(f"{adam_keys[0]} has no effect on {self.name}; leave it out")
        return self

    @property
    def entry(self) -> OptimizerEntry:
        """The optimizer's entry in the table."""
        return OPTIMIZERS[self.name]

    def steps_over(self, examples: int) -> int:
        """The run's optimiser steps over so many training examples: `steps`, `epochs`, or the less of both."""
        if self.epochs is None:
            assert self.steps is not None  # noqa: S101 - `_fits`
            return self.steps
        passes = math.ceil(self.epochs * examples / self.batch_size)
        return passes if self.steps is None else min(self.steps, passes)

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of so many, by either key; by default at most a fifth of the run."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * steps)
        return self.warmup_steps if "warmup_steps" in self.model_fields_set else min(self.warmup_steps, steps // 5)


class Evaluation(Strict):
    """The loss on held-out examples during training, and what follows from it.

    Attributes:
        data: The held-out examples; a path or a list, like the recipe's `data`.
        share: Instead of `data`: hold out this share of the training data, by a hash of the prompt (or the pair's id),
            so that a prompt is never on both sides.
        every: Steps between evaluations. There is also one before the first step and one after the last.
        micro_batch: Examples a forward pass; by default the optimizer's.
        limit: Use only so many examples: equally many of each data set, as far as it has them, the first ones of each.
        patience: Stop after so many evaluations in a row without a better loss; unset: never.
        min_delta: A loss counts as better if it is lower by more than this.
        keep_best: Save the adapter with the best loss, not the last one.
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


class Profile(Strict):
    """A window of steps whose operators are recorded, with times and shapes, in `OUT/profile/steps-FIRST-LAST.json.gz`.

    Perfetto (ui.perfetto.dev) and `chrome://tracing` open the file.

    Attributes:
        steps: The first and the last step to record, counted from 1. A step of a large model is some 100 MB.
        memory: Record allocations, too.
    """

    steps: tuple[PositiveInt, PositiveInt]
    memory: bool = False

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[1] < value[0]:
            raise ValueError(f"the last step, {value[1]}, is before the first, {value[0]}")
        return value


class TrainRecipe(Strict):
    """The keys that SFT and the judge share.

    Attributes:
        base: Folder of the base model.
        out: Folder of the run: `run.json`, `metrics.jsonl`, `metrics.png`, `adapter/` (PEFT), `checkpoints/`.
        role: The role that the adapter is for.
        data: A file, a folder or a pattern of files, or a list of them and of Hub data sets with weights.
        on_bad_row: A row that is no chat or no pair, or that the template refuses, ends the run (`stop`), or is left
            out and counted (`skip`). A pair whose other order is bad is left out, too.
        data_processes: Processes that tokenise the data.
        data_cache: Folder of the tokenised data, which runs share; by default `data-cache` beside `out`.
        chat_template: The name of one of the base's chat templates, or a Jinja file; by default the base's `default`,
            with its `tool_use` where a chat has tools.
        max_length: Most tokens of an example. `truncation` decides on longer chats; longer pairs are left out.
        lora: What is trained.
        optimizer: How it is trained.
        evaluation: Held-out loss, early stopping, and the best adapter; unset: the last adapter is saved.
        attention: The attention implementation. `auto` takes the fastest that is there and says which: in bfloat16 on a
            GPU flash-attn if it is installed, else torch's own (`varlen`).
        deepspeed: DeepSpeed's own JSON config; ZeRO stage 3.
        processes: Processes to start on this node, if no launcher (torchrun, deepspeed, Slurm) started the command.
        parallel: What they divide besides the weights: `{sequences: N}` for chats too long for one GPU.
        threads: CPU threads a process; by default the cores that the run may use, divided by `processes`.
        timeout_minutes: How long a process waits for the others before the run ends, while it loads the base, for
            example. A dead process ends the run sooner.
        dtype: Type of the base, the adapter and the activations.
        quantization: Hold the frozen experts' weights in 8 bits (`int8`) or in 4 (`nf4`, QLoRA's, arXiv 2305.14314),
            with a scale for each 64 of them: for less memory and smaller gathers. Unset: in `dtype`.
        gradient_checkpointing: Store only each layer's input for the backward pass and recompute the rest: a third more
            compute for a fraction of the memory.
        save_every: Steps between checkpoints that a later run can resume from; 0: only at SIGTERM.
        resume: If `out` holds an unfinished run, `auto` resumes from its last whole checkpoint, `never` refuses to.
        log_every: Steps between rows of `metrics.jsonl`.
        seed: Seed of the adapter's initial values, of dropout, and of the mixing and order of the data.
        data_seed: Seed of the mixing and order of the data alone; by default `seed`.
        wandb: Weights & Biases mode; `metrics.jsonl` and `metrics.png` are always written.
        wandb_project: Weights & Biases project.
        wandb_entity: Weights & Biases team or user; by default the account's own.
        trackers: More trackers of the metrics, through transformers' own callbacks: `tensorboard` writes to
            `OUT/tensorboard`, `mlflow` to `MLFLOW_TRACKING_URI` or `OUT/mlflow.db`.
        profile: Steps to record with torch's profiler, on process 0.
    """

    base: FilePath
    out: FilePath
    role: RoleName
    data: Data
    on_bad_row: Literal["stop", "skip"] = "stop"
    data_processes: PositiveInt = 1
    data_cache: FilePath | None = None
    chat_template: str | None = Field(default=None, min_length=1)
    max_length: PositiveInt = 1024
    lora: Lora = Lora()
    optimizer: Optimizer
    evaluation: Evaluation | None = None
    attention: Literal[
        "auto", "eager", "sdpa", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    deepspeed: FilePath
    processes: PositiveInt = 1
    parallel: Parallel = Parallel()
    threads: PositiveInt | None = None
    timeout_minutes: Annotated[int, Field(gt=0, le=1440)] = 30
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    save_every: int = Field(default=0, ge=0)
    resume: Literal["auto", "never"] = "auto"
    log_every: PositiveInt = 1
    seed: int = 0
    data_seed: int | None = None
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "mixfuse"
    wandb_entity: str | None = None
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    profile: Profile | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_experts(cls, data: Any) -> Any:
        """Refuses `parallel.experts` with the reason, where "unknown key" would leave its user guessing."""
        parallel = data.get("parallel") if isinstance(data, Mapping) else None
        if isinstance(parallel, Mapping) and "experts" in parallel:
            raise ValueError(_EXPERTS_NOT_BUILT)
        return data

    @property
    def order_seed(self) -> int:
        """The seed of the data's mixing and order."""
        return self.seed if self.data_seed is None else self.data_seed


class SftRecipe(TrainRecipe):
    """Supervised fine-tuning on chats: rows of `{id, messages: [...]}`, loss on the assistant's tokens.

    Attributes:
        loss_on: Train on every assistant turn of a chat, or on the last one.
        truncation: A chat longer than `max_length` is dropped (and counted), loses its beginning (`left`) or its end
            (`right`), or is an error. A chat with no token left to learn from is dropped.
        empty_answers: An answer that says nothing is not learned (`leave_out`; the run prints how many there are), or
            is learned as an end at once (`learn`).
        packing: Fill rows of `max_length` tokens with several whole chats, each of which attends only to itself.
        router_aux_loss_coef: Weight of the load-balancing loss (Switch Transformers, arXiv 2101.03961, eq. 4-6).
    """

    role: RoleName = "domain"
    loss_on: Literal["all", "last"] = "all"
    truncation: Literal["drop", "left", "right", "error"] = "drop"
    empty_answers: Literal["leave_out", "learn"] = "leave_out"
    packing: bool = False
    router_aux_loss_coef: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _chats_stay_apart(self) -> Self:
        if self.parallel.sequences > 1 and self.attention not in ("auto", *SEQUENCE_ATTENTION):
            raise ValueError(
                f"attention: {self.attention} does not go with parallel.sequences: DeepSpeed's Ulysses drops its mask, "
                f"so chats in one pass would see one another; use auto or one of {', '.join(SEQUENCE_ATTENTION)}"
            )
        return self


class JudgeRecipe(TrainRecipe):
    """DPO on verdicts: rows of `mixfuse pairs build`; the reference is the policy without the judge adapter.

    A pair longer than `max_length` in either order is left out, because truncation would cut off its verdict. If the
    completions are verdicts, chosen and rejected are read from one pass over the prompt, and the calibration is fitted
    to held-out pairs.

    Attributes:
        completion: The pairs' completions: a `verdict`, of which the first token is trained, or a `rationale` that ends
            in one, trained whole.
        orders: Train on both orders of a pair, side by side, or only on the first of its rows.
        warm_start: The first so many of the run's steps are SFT on the chosen verdict. Then DPO begins, with the
            policy after these steps as its reference.
        loss: DPO's (arXiv 2305.18290, eq. 7) or IPO's (arXiv 2310.12036, eq. 17), as TRL computes them.
        beta: Strength of the pull towards the reference; for IPO the regularisation τ.
        sft_weight: Weight of the chosen completion's negative log-likelihood, added to that loss (RPO, arXiv
            2404.19733).
        margin: Offset that a pair must overcome, multiplied by the row's `margin`, the strength of its vote (ODPO,
            arXiv 2402.10571, eq. 8). A row without `margin` counts as 1.
        consistency: Weight of a penalty on preferring a position: the square of β times the log-odds for the answer
            shown first, averaged over the two orders of a pair. DPO's own pull towards zero fades as the margins grow.
        rounds: Number of equal parts of the run's steps. Each after the first trains only on the pairs that the judge
            gets wrong or flips when the part begins.
        reference_batch: Comparisons a pass, on each process, for the reference's log-probabilities. Without gradients a
            pass has room for more of them than in training, and each pass gathers the whole base.
        reference_cache: A JSON file in which runs on the same base share the reference's log-probabilities; unset: the
            run has its own.
    """

    role: RoleName = "judge"
    completion: Literal["verdict", "rationale"] = "verdict"
    orders: Literal["both", "one"] = "both"
    warm_start: int = Field(default=0, ge=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: PositiveFloat = 0.1
    sft_weight: float = Field(default=0.0, ge=0)
    margin: float = Field(default=0.0, ge=0)
    consistency: float = Field(default=0.0, ge=0)
    rounds: int = Field(default=1, ge=1)
    reference_batch: PositiveInt = 16
    reference_cache: FilePath | None = None

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.parallel.sequences > 1:
            raise ValueError(_NO_SEQUENCES)
        one_token = {"warm_start", "margin", "consistency", "rounds", "reference_batch", "reference_cache"}
        if self.completion == "rationale" and (changed := one_token & self.model_fields_set):
            raise ValueError(f"{min(changed)} goes with completion: verdict; for a rationale use sft_weight")
        if self.rounds > 1 and self.orders == "one":
            raise ValueError("rounds need orders: both, and a step each")
        if self.optimizer.steps is not None:
            self.check_steps(self.optimizer.steps)
        if self.consistency and (self.orders == "one" or self.optimizer.micro_batch % 2):
            raise ValueError("consistency compares the orders of a pair; set orders: both and an even micro_batch")
        return self

    def check_steps(self, steps: int) -> None:
        """Checks the parts of a run of so many steps.

        Raises:
            ValueError: The warm start or the rounds take more steps than there are.
        """
        if self.warm_start > steps:
            raise ValueError(f"warm_start {self.warm_start} is above the run's {steps} steps (optimizer)")
        if self.rounds > steps:
            raise ValueError("rounds need orders: both, and a step each")


RECIPES: dict[str, type[TrainRecipe]] = {"sft": SftRecipe, "judge": JudgeRecipe}
"""The recipe of each stage of `mixfuse train`."""


def load_recipe(path: Path, stage: str, overrides: Iterable[str] = ()) -> TrainRecipe:
    """Loads the recipe of a stage; see `strict_yaml.load`.

    Raises:
        MixfuseError: Also where the file is the other stage's recipe, as its keys show.
    """
    own = RECIPES[stage]
    data = read_mapping(path)
    for other, recipe in RECIPES.items():
        only_there = data.keys() & (recipe.model_fields.keys() - own.model_fields.keys())
        if only_there and not data.keys() & (own.model_fields.keys() - recipe.model_fields.keys()):
            raise MixfuseError(f"{path}: `mixfuse train {other}` reads this recipe (it has {sorted(only_there)[0]!r})")
    return validate(override(data, overrides), own, source=str(path))


def kind_of(recipe_path: Path, overrides: list[str]) -> type[TrainRecipe]:
    """The recipe's class: a judge's file has a key that only a judge has, or its role; any other file is for SFT."""
    judges = set(JudgeRecipe.model_fields) - set(SftRecipe.model_fields)
    names = {assignment.partition("=")[0] for assignment in overrides}
    try:
        data = read_mapping(recipe_path)
    except MixfuseError:
        return SftRecipe  # loading it reports the error
    return JudgeRecipe if (set(data) | names) & judges or data.get("role") == "judge" else SftRecipe
