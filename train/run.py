"""One training run: from the recipe to the run folder it leaves.

`sft.py` and `judge.py` say what is trained; everything they share is here. A run is started by `start`, which is either
one of the processes of a launcher (torchrun, deepspeed, Slurm: `WORLD_SIZE` is set) or starts torchrun with the
recipe's number of processes, be it one.
"""

import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, disk_errors, read_json, write_json
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import guard, worker
from mixfuse.train.processes.checkpoint import check_resume, checkpoints, last_checkpoint
from mixfuse.train.processes.heartbeat import heartbeat
from mixfuse.train.recipe import JudgeRecipe, SftRecipe, TrainRecipe
from mixfuse.train.stages.training_metrics import draw, end_wandb, read_rows, start_wandb, watch

RECIPES: dict[str, type[TrainRecipe]] = {"sft": SftRecipe, "judge": JudgeRecipe}


def start(stage: str, recipe_path: Path, overrides: list[str]) -> None:
    """Runs `mixfuse train STAGE RECIPE [key=value …]`.

    Args:
        stage: "sft" or "judge".
        recipe_path: The YAML recipe.
        overrides: `dotted.key=value` strings.

    Raises:
        MixfuseError: The recipe or data is bad (found before any process is started), or a process failed.
        Preempted: SIGTERM came; the run is saved.
    """
    recipe = load(recipe_path, RECIPES[stage], overrides)
    check_recipe(recipe)
    if not worker.launched():  # what a launcher started finds the same mistakes where it prepares the data
        _check_data(recipe)
    if finished(recipe.out):
        raise MixfuseError(f"{recipe.out} holds a finished run; choose another `out` or remove it")
    check_resume(recipe.out, _described(recipe), resume=recipe.resume)
    if not worker.launched():
        _launch(stage, recipe, recipe_path, overrides)
        return
    guard.listen()
    worker.prepare(recipe.threads, wandb=recipe.wandb)
    if stage == "sft":
        from mixfuse.train.stages.sft import train as train_stage
    else:
        from mixfuse.train.stages.judge_dpo import train as train_stage
    with heartbeat():
        train_stage(recipe)


def check_recipe(recipe: TrainRecipe) -> None:
    """Checks what can be checked without loading anything.

    Raises:
        MixfuseError: A file is missing or the batch does not divide.
    """
    if not (recipe.base / "config.json").is_file():
        raise MixfuseError(
            f"base: {recipe.base} is no model folder (no config.json); build one with: mixfuse base build {recipe.base}"
        )
    model = read_json(recipe.base / "config.json")
    if model.get("model_type") == "mixtral":  # anything else is refused where it is loaded
        recipe.lora.chosen(model["num_hidden_layers"], model["num_local_experts"])
    config = read_json(recipe.deepspeed)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        raise MixfuseError(f"deepspeed: {recipe.deepspeed} sets ZeRO stage {stage!r}; mixfuse trains with stage 3")
    per_pass = recipe.optimizer.micro_batch * worker.world_size(recipe.processes)
    if recipe.optimizer.batch_size % per_pass:
        raise MixfuseError(
            f"optimizer.batch_size {recipe.optimizer.batch_size} is no multiple of micro_batch * processes = {per_pass}"
        )


def _check_data(recipe: TrainRecipe) -> None:
    """Reads all of the data once, keeping none of it."""
    from mixfuse.train.data.chats import check_chats
    from mixfuse.train.data.pairs import check_pairs

    check = check_chats if isinstance(recipe, SftRecipe) else check_pairs
    check(recipe.data)
    if recipe.evaluation and recipe.evaluation.data:
        check(recipe.evaluation.data)


def finished(out: Path) -> bool:
    """Whether `out` holds a finished run."""
    return (out / "run.json").is_file()


def _described(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as `recipe.json` keeps it, with the processes there really are."""
    return {**recipe.model_dump(mode="json"), "processes": worker.world_size(recipe.processes)}


def _launch(stage: str, recipe: TrainRecipe, recipe_path: Path, overrides: list[str]) -> None:
    """Starts the recipe's processes on this machine and waits for them."""
    from mixfuse.train.processes import graceful_torchrun

    os.environ["OMP_NUM_THREADS"] = str(worker.threads(recipe.threads, recipe.processes))
    command = [sys.executable, "-m", "mixfuse", "train", stage, str(recipe_path), *overrides]
    graceful_torchrun.run(["--standalone", f"--nproc-per-node={recipe.processes}", "--no-python", *command])


def trainer_arguments(recipe: TrainRecipe) -> dict[str, Any]:
    """The arguments SFTConfig and DPOConfig share. Constructing either makes the ZeRO-3 config alive for loading."""
    import torch

    world = worker.world_size(recipe.processes)
    optimizer, evaluation = recipe.optimizer, recipe.evaluation
    cosine_end = {"min_lr": optimizer.min_learning_rate} if optimizer.min_learning_rate else None
    return {
        "output_dir": str(recipe.out / "checkpoints"),
        "max_steps": optimizer.steps,
        "per_device_train_batch_size": optimizer.micro_batch,
        "gradient_accumulation_steps": optimizer.batch_size // (optimizer.micro_batch * world),
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": optimizer.warmup,
        "lr_scheduler_type": "cosine_with_min_lr" if cosine_end else optimizer.schedule,
        "lr_scheduler_kwargs": cosine_end or {},
        "optim": "adamw_torch",
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
        "deepspeed": str(recipe.deepspeed),
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": min(recipe.log_every, optimizer.steps),  # every run logs a loss
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 500,
        "logging_nan_inf_filter": False,  # it would log the average of other steps for a loss that is not a number
        "eval_strategy": "steps" if evaluation else "no",
        "eval_steps": evaluation.every if evaluation else None,
        "per_device_eval_batch_size": (evaluation and evaluation.micro_batch) or optimizer.micro_batch,
        "remove_unused_columns": False,  # the ids of a batch's examples travel with it
        "report_to": [] if recipe.wandb == "disabled" else ["wandb"],
        "run_name": recipe.out.name,
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_timeout": 1800,
    }


def train_and_save(trainer: Any, recipe: TrainRecipe, *, stage: str, examples: int | None = None) -> None:
    """Trains, resuming from the last checkpoint where there is one, and leaves the run folder.

    The folder's `run.json` is written last: a run without it is unfinished.

    Args:
        trainer: TRL's, with what this project adds (`train/stages/trainers.py`).
        recipe: The run's.
        stage: "sft" or "judge".
        examples: How many there are to train on, where they are not one a row.

    Raises:
        MixfuseError: A base weight became trainable, the disk is full, or the trained adapter is empty, does nothing or
            is not finite.
    """
    from safetensors.torch import load_file

    from mixfuse.train.adapters.export import check_weights
    from mixfuse.train.data.chats import described
    from mixfuse.train.model.expert_lora import assert_in_force
    from mixfuse.train.stages.evaluation import BEST, FACTS, KeepBest, best_evaluation

    _only_lora_trains(trainer.model)
    assert_in_force(trainer.model)
    checkpoint_without_reentry(trainer)
    out = recipe.out
    leads = trainer.is_world_process_zero()
    last = worker.agree(last_checkpoint(out))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if leads and last is None:
            write_json(out / "recipe.json", _described(recipe))
        start_wandb(recipe, resumed=last is not None)
        watch(trainer, out, resumed=last is not None)
        trainer.add_callback(checkpoints())
        if recipe.evaluation:
            trainer.add_callback(KeepBest(trainer, recipe.evaluation, out))
            trainer.args.eval_on_start = last is None
        trainer.add_callback(guard.guard(trainer, out))  # after those that save: it may end the run
        began = time.time()
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except BaseException:
            if leads:
                draw(out)  # for whoever looks for the reason
            end_wandb(failed=True)
            raise
        end_wandb()
    # Under ZeRO-3 every rank takes part in gathering the adapter; rank 0 writes it.
    weights = gather_adapter(trainer)
    if leads:
        best = best_evaluation(out)
        check_weights(load_file(out / BEST / "adapter_model.safetensors") if best else weights, out)
        with atomic_directory(out / "adapter", replace=True) as temporary:
            if best:
                shutil.copytree(out / BEST, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FACTS))
            else:
                save_peft(trainer.accelerator.unwrap_model(trainer.model), weights, temporary)
        draw(out)
        losses = [row["loss"] for row in read_rows(out / "metrics.jsonl") if "loss" in row]
        tail = losses[-10:]
        write_json(
            out / "run.json",
            {
                "stage": stage,
                "role": recipe.role,
                "base": str(recipe.base),
                "recipe": recipe.model_dump(mode="json"),
                "metrics": {
                    "first_loss": losses[0],
                    "last_loss": sum(tail) / len(tail),
                    "steps": trainer.state.global_step,
                    "examples": examples or len(trainer.train_dataset),
                    "processes": worker.world_size(recipe.processes),
                    "trainable_parameters": sum(tensor.numel() for tensor in weights.values()),
                    "seconds": round(time.time() - began, 1),
                    **({"best_step": best["step"], "best_eval_loss": best["eval_loss"]} if best else {}),
                },
                "libraries": libraries(),
                "judge_protocol": judge_protocol.describe() if stage == "judge" else None,
                "calibration": calibration_of(out, best["step"] if best else trainer.state.global_step),
                "training_data": [described(source) for source in recipe.data],
            },
        )
        for folder in ("checkpoints", "data", BEST):
            shutil.rmtree(out / folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def calibration_of(out: Path, step: int) -> dict[str, float] | None:
    """What a judge's evaluation at that step fitted (`train/stages/trainers.py`); None where none did."""
    rows = [row for row in read_rows(out / "metrics.jsonl") if row["step"] == step and "eval_temperature" in row]
    if not rows:
        return None
    return {"temperature": rows[-1]["eval_temperature"], "tie_margin": rows[-1]["eval_tie_margin"]}


def checkpoint_without_reentry(trainer: Any) -> None:
    """Makes gradient checkpointing the kind that is not reentrant.

    TRL 1.16 forces reentrant checkpointing on LoRA under ZeRO-3. With it, DeepSpeed 0.19.8 holds the frozen parameters
    of every layer that it computes for the second time until the whole backward pass ends: it files them under the last
    module whose backward pass has begun, and that is the model. Each process ends up with all of the base gathered, 281
    GB at 8x22B. Without reentry that module is the layer's own MoE block. `tests/train/test_plan.py` measures it.
    """
    if trainer.args.gradient_checkpointing:
        trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": False}


def gather_adapter(trainer: Any) -> dict[str, Any]:
    """Gathers every LoRA tensor, whole, to the CPU of rank 0, under PEFT's saved names. All ranks must call this.

    Empty adapter files under ZeRO-3 (DeepSpeed #7900, PEFT #453) come from reading partitioned tensors.
    """
    import torch
    from deepspeed.runtime.zero import GatheredParameters

    if hasattr(trainer.model_wrapped, "empty_partition_cache"):
        # An evaluation's last forward pass leaves parameters in flight, read ahead for a backward pass that never is,
        # and DeepSpeed 0.19.8 fails below: "Cannot partition a param in flight". Seen on the embedded base on two
        # processes (scripts/demo); the tiny base does not show it.
        trainer.model_wrapped.empty_partition_cache()
    model = trainer.model
    while not hasattr(model, "peft_config"):
        model = model.module
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[name.replace(".default.", ".")] = parameter.detach().cpu().clone()
    return state


def save_peft(model: Any, weights: dict[str, Any], out: Path) -> None:
    """Writes a plain PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`."""
    from safetensors.torch import save_file

    from mixfuse.train.model.expert_lora import as_plain_peft

    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    if config.get("target_parameters"):
        config["lora_dropout"] = 0.0  # matters to training alone, and plain PEFT refuses any on these
    write_json(out / "adapter_config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in as_plain_peft(model, weights).items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def libraries() -> dict[str, str]:
    """Versions of the libraries an adapter was made with."""
    names = ("torch", "transformers", "peft", "trl", "deepspeed", "mixfuse")
    return {name: version(name) for name in names}


def _only_lora_trains(model: Any) -> None:
    wrong = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    if wrong:
        raise MixfuseError(f"{len(wrong)} base weights are trainable, e.g. {wrong[0]!r}; only LoRA weights may be")
