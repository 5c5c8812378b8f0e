"""What both stages share: the trainer's arguments, training itself, and the run folder it leaves."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.adapter import Probes
from mixfuse.contracts.chat_template import digest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, disk_errors, read_json, write_json
from mixfuse.train.adapters.saving import check_weights, gather_adapter, library_versions, save_peft
from mixfuse.train.data.sources import describe_source
from mixfuse.train.planning import training_plan
from mixfuse.train.processes import guard, whole_state, worker
from mixfuse.train.processes.checkpoint import checkpoints, last_checkpoint, processes_of, recipe_record, step
from mixfuse.train.recipe import TrainRecipe
from mixfuse.train.stages.profiling import profiler
from mixfuse.train.stages.trackers import place_trackers
from mixfuse.train.stages.training_metrics import add_metrics_log, draw, end_wandb, read_rows, start_wandb


def trainer_arguments(recipe: TrainRecipe, steps: int) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share.

    Constructing either config activates transformers' ZeRO-3 integration, which loading the base relies on.

    Args:
        recipe: The run's recipe.
        steps: The run's optimiser steps (`Optimizer.steps_over`).
    """
    import torch

    readers = worker.world_size(recipe.processes) // recipe.parallel.sequences
    optimizer, evaluation = recipe.optimizer, recipe.evaluation
    place_trackers(recipe)
    warmup = optimizer.warmup(steps)
    if warmup >= steps:
        worker.say_once(
            f"the warm-up of {warmup} steps takes all of the run's {steps}: the rate does not reach its peak"
        )
    cosine_end = {"min_lr": optimizer.min_learning_rate} if optimizer.min_learning_rate else None
    return {
        "output_dir": str(recipe.out / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": optimizer.micro_batch,
        "gradient_accumulation_steps": optimizer.batch_size // (optimizer.micro_batch * readers),
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": warmup,
        "lr_scheduler_type": "cosine_with_min_lr" if cosine_end else optimizer.schedule,
        "lr_scheduler_kwargs": cosine_end or {},
        "optim": optimizer.entry.transformers_name,
        "optim_args": optimizer.entry.arguments,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "max_length": recipe.max_length,
        "seed": recipe.seed,
        "data_seed": recipe.order_seed,
        "bf16": recipe.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": deepspeed_config(recipe),
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": min(recipe.log_every, steps),  # every run logs a loss
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 500,
        "logging_nan_inf_filter": False,  # the filter would log other steps' average in place of a NaN loss
        "eval_strategy": "steps" if evaluation else "no",
        "eval_steps": evaluation.every if evaluation else None,
        "per_device_eval_batch_size": (evaluation and evaluation.micro_batch) or optimizer.micro_batch,
        "remove_unused_columns": False,  # a batch carries the ids of its examples
        "report_to": [*([] if recipe.wandb == "disabled" else ["wandb"]), *recipe.trackers],
        "run_name": recipe.out.name,
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_timeout": 60 * recipe.timeout_minutes,
    }


def deepspeed_config(recipe: TrainRecipe) -> dict[str, Any]:
    """DeepSpeed's JSON, with ZeRO-3's settings for gathering as the plan for these machines has them.

    The plan is `mixfuse plan`'s; what it leaves `auto`, transformers fills.
    """
    planned = training_plan.plan(
        recipe, read_json(recipe.base / "config.json"), read_json(recipe.deepspeed), _hardware()
    )
    if planned.ahead:
        worker.say_once(f"ZeRO-3 gathers ahead: {planned.ahead}")
    return dict(planned.zero3)


def _hardware() -> training_plan.Hardware:
    """The machines of this run, as every process sees them alike."""
    import psutil
    import torch

    device, here = worker.device(), worker.local_world_size()
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total // here
    return training_plan.Hardware(
        nodes=max(1, worker.world_size(1) // here),
        gpus=here,
        gpu_bytes=worker.agree(int(memory)),
        reserve_bytes=training_plan.RESERVE if cuda else 0,
        cuda=cuda,
    )


def train_and_save(trainer: Any, recipe: TrainRecipe, *, stage: str, examples: int | None = None) -> None:
    """Trains, resuming from the last whole checkpoint if there is one, and leaves the run folder.

    The folder's `run.json` is written last: a run without it is unfinished.

    Args:
        trainer: TRL's trainer with this project's additions (`train/stages/trainers.py`).
        recipe: The run's recipe.
        stage: "sft" or "judge".
        examples: Number of training examples; by default the rows of the trainer's data set.

    Raises:
        MixfuseError: A base weight became trainable, the disk is full, or the trained adapter is empty, does nothing or
            is not finite.
    """
    from mixfuse.train.model.expert_lora import assert_in_force
    from mixfuse.train.stages.run_probes import run_probes

    _check_only_lora_trains(trainer.model)
    assert_in_force(trainer.model)
    _register_what_peft_reads(trainer.model)
    disable_reentrant_checkpointing(trainer)
    started = time.time()
    _train(trainer, recipe)
    # Under ZeRO-3 every rank takes part in gathering the adapter; rank 0 writes it.
    weights = gather_adapter(trainer)
    probes = run_probes(trainer, recipe)
    if trainer.is_world_process_zero():
        best = _save_adapter(trainer, recipe.out, weights, probes)
        draw(recipe.out)
        losses = [row["loss"] for row in read_rows(recipe.out / "metrics.jsonl") if "loss" in row]
        tail = losses[-10:]
        metrics = {
            "first_loss": losses[0],
            "last_loss": sum(tail) / len(tail),
            "steps": trainer.state.global_step,
            "examples": examples or len(trainer.train_dataset),
            "processes": worker.world_size(recipe.processes),
            "trainable_parameters": sum(tensor.numel() for tensor in weights.values()),
            "seconds": round(time.time() - started, 1),
            **({"best_step": best["step"], "best_eval_loss": best["eval_loss"]} if best else {}),
        }
        _write_run(recipe, stage, metrics, chat_template=trainer.processing_class.chat_template)
    trainer.accelerator.wait_for_everyone()


def _register_what_peft_reads(model: Any) -> None:
    """Tells ZeRO-3 that a layer with LoRA reads the dtype of its `lora_A` itself (`_cast_input_dtype` in PEFT).

    DeepSpeed finds that out by itself where the weight is not gathered (`ZeROOrderedDict`), in a fresh run in the first
    pass. After it has loaded its own checkpoint the weights are there in the first pass and not in the second, which
    then fetches others than it recorded in the first, and the run ends with a "tracing error".
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            for lora_A in layer.lora_A.values():  # noqa: N806 - PEFT's name
                register_external_parameter(layer, lora_A.weight)


def _train(trainer: Any, recipe: TrainRecipe) -> None:
    """Adds the callbacks and trains from the last whole checkpoint, or from the start."""
    from mixfuse.train.stages.evaluation import KeepBest

    out = recipe.out
    leads = trainer.is_world_process_zero()
    last = worker.agree(last_checkpoint(out))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if last is not None:
            worker.say_once(f"resuming from {last}: step {step(last) + 1} of {trainer.args.max_steps} is next")
        if leads and last is None:
            write_json(out / "recipe.json", recipe_record(recipe))
        start_wandb(recipe, resumed=last is not None)
        add_metrics_log(trainer, recipe, resumed=last is not None)
        if recipe.profile:
            trainer.add_callback(profiler(recipe.profile, out))
        trainer.add_callback(checkpoints())
        if recipe.evaluation:
            trainer.add_callback(KeepBest(trainer, recipe, recipe.evaluation))
            trainer.args.eval_on_start = last is None
        trainer.add_callback(guard.guard(trainer, out))  # after the callbacks that save: it may end the run
        try:
            # A checkpoint of as many processes holds the state of their random numbers, too: it is the exact one.
            other = last is not None and processes_of(last) != trainer.args.world_size
            with whole_state.loading() if other else nullcontext():
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        except BaseException:
            if leads:
                draw(out)  # the plots may show why
            end_wandb(failed=True)
            raise
        end_wandb()


def _save_adapter(trainer: Any, out: Path, weights: dict[str, Any], probes: Probes) -> dict[str, Any] | None:
    """Writes `OUT/adapter`: the best evaluation's adapter if one was kept, else the last.

    Returns:
        `{step, eval_loss}` of the best evaluation, or None.
    """
    from safetensors.torch import load_file

    from mixfuse.train.stages.evaluation import BEST, FACTS, best_evaluation
    from mixfuse.train.stages.run_probes import write_probes

    best = best_evaluation(out)
    check_weights(load_file(out / BEST / "adapter_model.safetensors") if best else weights, out)
    with atomic_directory(out / "adapter", replace=True) as temporary:
        if best:
            shutil.copytree(out / BEST, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FACTS))
        else:
            save_peft(trainer.accelerator.unwrap_model(trainer.model), weights, temporary)
            write_probes(probes, temporary)
    return best


def _write_run(recipe: TrainRecipe, stage: str, metrics: dict[str, Any], *, chat_template: str) -> None:
    """Writes `run.json` and removes what only an unfinished run needs."""
    from mixfuse.train.stages.evaluation import BEST

    write_json(
        recipe.out / "run.json",
        {
            "stage": stage,
            "role": recipe.role,
            "base": str(recipe.base),
            "recipe": recipe.model_dump(mode="json"),
            "metrics": metrics,
            "libraries": library_versions(),
            "chat_template": digest(chat_template),
            "judge_protocol": judge_protocol.describe() if stage == "judge" else None,
            "calibration": _calibration_at(recipe.out, metrics.get("best_step", metrics["steps"])),
            "training_data": [describe_source(source) for source in recipe.data],
        },
    )
    for folder in ("checkpoints", "data", BEST):
        shutil.rmtree(recipe.out / folder, ignore_errors=True)


def _calibration_at(out: Path, step: int) -> dict[str, float] | None:
    """The calibration that a judge's evaluation at `step` fitted (`train/stages/trainers.py`), or None."""
    rows = [row for row in read_rows(out / "metrics.jsonl") if row["step"] == step and "eval_temperature" in row]
    if not rows:
        return None
    return {"temperature": rows[-1]["eval_temperature"], "tie_margin": rows[-1]["eval_tie_margin"]}


def disable_reentrant_checkpointing(trainer: Any) -> None:
    """Makes gradient checkpointing non-reentrant.

    TRL 1.16 forces reentrant checkpointing on LoRA under ZeRO-3. With it, DeepSpeed 0.19.8 keeps the frozen parameters
    of every recomputed layer until the whole backward pass ends: it files them under the last module whose backward
    pass has begun, which is the model. Each process ends up with the whole base gathered, 281 GB at 8x22B. Without
    reentry that module is the layer's own MoE block. `tests/train/test_plan.py` measures it.
    """
    if trainer.args.gradient_checkpointing:
        trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": False}


def _check_only_lora_trains(model: Any) -> None:
    wrong = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    if wrong:
        raise MixfuseError(f"{len(wrong)} base weights are trainable, e.g. {wrong[0]!r}; only LoRA weights may be")
