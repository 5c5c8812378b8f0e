"""Checkpoints: which of them are whole, which run may go on from them, and which are kept.

The trainer writes a checkpoint into its final place, every process its own files of it, and rank 0 is done first. So a
checkpoint counts only once it is marked: when every process has written and flushed its part, rank 0 leaves a list of
the files with their sizes in it, under a temporary name that is then renamed. What bears no mark, or does not agree
with it, is never loaded, and is removed when the run goes on.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, write_json
from mixfuse.train.processes import worker
from mixfuse.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from transformers import TrainerCallback

WHOLE = "whole.json"  # the mark of a checkpoint that is
KEEP = 2  # whole checkpoints that stay: the newest, and one more should the disk have spoiled it
# What a resumed run may change: nothing here alters a weight.
FREE_ON_RESUME = (
    "threads", "data_processes", "save_every", "log_every", "wandb", "wandb_project", "wandb_entity", "resume"
)  # fmt: skip


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`."""
    return next(iter(_whole(out)), None)


def recipe_record(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as `recipe.json` holds it, with the number of processes that really run."""
    return {**recipe.model_dump(mode="json"), "processes": worker.world_size(recipe.processes)}


def check_resume(out: Path, described: dict[str, Any], *, resume: str) -> None:
    """Checks that a run to be resumed is still the same run.

    A ZeRO-3 checkpoint holds one file a process, cut by the world size, so the number of processes is fixed; and half a
    run with another data set or rank is no run of any recipe.

    Args:
        out: The run's folder.
        described: The recipe as `recipe.json` would keep it now.
        resume: The recipe's key: "auto" goes on from a checkpoint, "never" refuses to where there is one.

    Raises:
        MixfuseError: There is a checkpoint, and a key of the recipe or the number of processes has changed since, or it
            is not to be used.
    """
    last = last_checkpoint(out)
    if last is None:
        return
    if resume == "never":
        raise MixfuseError(
            f"{out} holds an unfinished run (step {step(last)}) and resume is never; choose another `out`, remove the "
            "folder to start over, or set resume=auto to go on"
        )
    before = read_json(out / "recipe.json")
    described = json.loads(json.dumps(described))  # as it was written: JSON's keys are text
    changed = next((key for key in described if before.get(key) != described[key] and key not in FREE_ON_RESUME), None)
    if changed == "processes":
        raise MixfuseError(
            f"{out} holds a run to resume whose 'processes' is {before[changed]}, not {described[changed]}: its "
            f"checkpoints hold one ZeRO-3 part for each process; start {before[changed]}, or choose another `out`"
        )
    if changed:
        raise MixfuseError(
            f"{out} holds a run to resume whose {changed!r} is {before.get(changed)!r}, not {described[changed]!r}; "
            "set it back, choose another `out`, or remove the folder to start over"
        )


def step(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints() -> "TrainerCallback":
    """A callback that marks every checkpoint as it is finished, and removes what is half-written or no longer needed.

    The trainer's own rotation (`save_total_limit`) must be off: it runs on rank 0 while others still write, and counts
    half-written checkpoints.
    """
    import torch
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir)
            if state.is_world_process_zero:
                whole = _whole(folder.parent)
                for path in _all(folder):
                    if path not in whole:
                        shutil.rmtree(path)
            torch.distributed.barrier()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            torch.distributed.barrier()
            if args.local_process_index == 0:  # each machine flushes what it wrote
                _flush(checkpoint)
            torch.distributed.barrier()
            if state.is_world_process_zero:
                mark(checkpoint, processes=args.world_size)
                best = Path(state.best_model_checkpoint).resolve() if state.best_model_checkpoint else None
                for old in _whole(folder.parent)[KEEP:]:
                    if old.resolve() != best:
                        shutil.rmtree(old)
            torch.distributed.barrier()  # whoever goes on, or ends the process, does so with a marked checkpoint

    return Checkpoints()


def mark(checkpoint: Path, *, processes: int) -> None:
    """Marks a checkpoint whose files are all on disk as whole."""
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
    write_json(checkpoint / WHOLE, {"step": step(checkpoint), "processes": processes, "files": sizes})


def _whole(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest first."""
    return [path for path in _all(out / "checkpoints") if _is_whole(path)]


def _all(folder: Path) -> list[Path]:
    """All checkpoints, half-written ones too, the newest first."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(named, key=step, reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / WHOLE).is_file():
        return False
    files = read_json(checkpoint / WHOLE)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == files[name] for name in files)


def _files(checkpoint: Path) -> Iterator[Path]:
    return (path for path in checkpoint.rglob("*") if path.is_file() and path.name != WHOLE)


def _flush(checkpoint: Path) -> None:
    """Has the system write a checkpoint's files, and its folders' entries, to the disk."""
    for path in (checkpoint, *checkpoint.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
