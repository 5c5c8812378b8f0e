"""`mixfuse train STAGE RECIPE`: starts one training run.

The command is either one process among those of a launcher (torchrun, deepspeed, Slurm: `WORLD_SIZE` is set), or it
starts torchrun with the recipe's number of processes, even for one. What a run then does is in `train/stages/`:
`sft.py` and `judge_dpo.py` build the trainer, `core.py` trains and writes the run folder.
"""

import os
import sys
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.processes import graceful_torchrun, guard, worker
from mixfuse.train.processes.checkpoint import check_resume, recipe_record
from mixfuse.train.processes.heartbeat import heartbeat
from mixfuse.train.recipe import RECIPES
from mixfuse.train.stages.checks import check_data, check_recipe


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
    recipe = load(recipe_path, RECIPES[stage], overrides)
    check_recipe(recipe)
    if not worker.launched():  # a launched process meets the same mistakes when it prepares the data
        check_data(recipe)
    if (recipe.out / "run.json").is_file():
        raise MixfuseError(f"{recipe.out} holds a finished run; choose another `out` or remove it")
    check_resume(recipe.out, recipe_record(recipe), resume=recipe.resume)
    if not worker.launched():
        os.environ["OMP_NUM_THREADS"] = str(worker.threads(recipe.threads, recipe.processes))
        command = [sys.executable, "-m", "mixfuse", "train", stage, str(recipe_path), *overrides]
        graceful_torchrun.torchrun(["--standalone", f"--nproc-per-node={recipe.processes}", "--no-python", *command])
        return
    guard.handle_sigterm()
    worker.prepare(recipe.threads, wandb=recipe.wandb)
    if stage == "sft":
        from mixfuse.train.stages.sft import train as train_stage
    else:
        from mixfuse.train.stages.judge_dpo import train as train_stage
    with heartbeat():
        train_stage(recipe)
