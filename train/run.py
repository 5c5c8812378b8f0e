"""`mixfuse train STAGE RECIPE`: starts one training run.

The command is either one process among those of a launcher (torchrun, deepspeed, Slurm: `WORLD_SIZE` is set), or it
starts torchrun with the recipe's number of processes, even for one. What a run then does is in `train/stages/`:
`sft.py` and `judge_dpo.py` build the trainer, `core.py` trains and writes the run folder.
"""

import os
import sys
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.processes import graceful_torchrun, guard, worker
from mixfuse.train.processes.checkpoint import check_resume, last_checkpoint, recipe_record
from mixfuse.train.processes.heartbeat import heartbeat
from mixfuse.train.recipe import load_recipe
from mixfuse.train.stages.checks import check_recipe, check_template
from mixfuse.train.stages.prepare_data import prepare_data


def start(stage: str, recipe_path: Path, overrides: list[str]) -> None:
    """Runs `mixfuse train STAGE RECIPE [key=value …]`.

    Args:
        stage: A key of `RECIPES`: "sft" or "judge".
        recipe_path: The YAML recipe.
        overrides: `dotted.key=value` strings.

    Raises:
        MixfuseError: The recipe or data is bad (reported before any process is started), or a process failed.
        Preempted: SIGTERM arrived; the run is saved.
    """
    recipe = load_recipe(recipe_path, stage, overrides)
    check_recipe(recipe)
    if not worker.launched():
        check_template(recipe)
    if (recipe.out / "run.json").is_file():
        raise MixfuseError(f"{recipe.out} holds a finished run; choose another `out` or remove it")
    check_resume(recipe.out, recipe_record(recipe), resume=recipe.resume)
    if worker.launched():
        guard.handle_sigterm()
        worker.set_environment(recipe.threads, wandb=recipe.wandb)
    # Before the processes join, so that no GPU and no collective waits for it.
    prepared = prepare_data(recipe, resuming=last_checkpoint(recipe.out) is not None)
    if not worker.launched():
        os.environ["OMP_NUM_THREADS"] = str(worker.threads(recipe.threads, recipe.processes))
        command = [sys.executable, "-m", "mixfuse", "train", stage, str(recipe_path), *overrides]
        options = graceful_torchrun.ON_THIS_MACHINE
        graceful_torchrun.torchrun([*options, f"--nproc-per-node={recipe.processes}", "--no-python", *command])
        return
    worker.prepare(recipe.threads, wandb=recipe.wandb, timeout_minutes=recipe.timeout_minutes)
    if stage == "sft":
        from mixfuse.train.stages.sft import train as train_stage
    else:
        from mixfuse.train.stages.judge_dpo import train as train_stage
    with heartbeat():
        train_stage(recipe, prepared)
