"""Checkpoints: which are whole, which run may resume from them, and which stay on disk.

transformers writes a checkpoint straight into its final folder; every process writes its own files, and rank 0 is done
first. So a checkpoint counts only once it is marked: when every process has written and flushed its part, rank 0 writes
a list of the files with their sizes, atomically. A checkpoint without this mark, or that differs from it, is never
loaded, and is removed when the run resumes.
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
from mixfuse.train.processes import whole_state, worker
from mixfuse.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from transformers import TrainerCallback

WHOLE = "whole.json"  # the mark of a whole checkpoint
KEEP = 2  # whole checkpoints on disk: the newest, and one more in case the disk damages it
# Keys that a resumed run may change, because none of them alters a weight.
FREE_ON_RESUME = (
    "threads", "timeout_minutes", "reference_batch", "data_processes", "data_cache", "save_every", "log_every",
    "wandb", "wandb_project", "wandb_entity", "trackers", "profile", "resume",
)  # fmt: skip


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`, or None."""
    return next(iter(_whole(out)), None)


def recipe_record(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as `recipe.json` holds it, with the number of processes that really run."""
    return {**recipe.model_dump(mode="json"), "processes": worker.world_size(recipe.processes)}


def check_resume(out: Path, record: dict[str, Any], *, resume: str) -> None:
    """Checks that the recipe of a run to resume has not changed.

    A run whose second half used other data or another rank would match no recipe. The number of processes may change,
    and with it the examples of a forward pass and what divides them (`parallel`): see `whole_state`.

    Args:
        out: The run's folder.
        record: The recipe as `recipe.json` would hold it now (`recipe_record`).
        resume: The recipe's key: "auto" resumes from a checkpoint, "never" refuses to.

    Raises:
        MixfuseError: There is a checkpoint, and `resume` is "never", or a key of the recipe has changed since; or the
            number of processes has, and the checkpoint holds only their parts.
    """
    last = last_checkpoint(out)
    if last is None:
        return
    if resume == "never":
        raise MixfuseError(
            f"{out} holds an unfinished run (step {step(last)}) and resume is never; choose another `out`, remove the "
            "folder to start over, or set resume=auto to resume it"
        )
    before = read_json(out / "recipe.json")
    record = json.loads(json.dumps(record))  # as it was written: JSON's keys are text
    if before.get("processes") != record["processes"] and not (last / whole_state.FILE).is_file():
        raise MixfuseError(
            f"{out} holds a run to resume whose 'processes' is {before.get('processes')}, not {record['processes']}: "
            f"{last.name} holds one ZeRO-3 part for each process and no {whole_state.FILE} (the optimizer is on NVMe, "
            f"or an earlier version wrote it); start {before.get('processes')}, or choose another `out`"
        )
    if isinstance(before.get("optimizer"), dict):
        before["optimizer"]["micro_batch"] = record["optimizer"]["micro_batch"]
    free = (*FREE_ON_RESUME, "processes", "parallel")
    changed = next((key for key in record if before.get(key) != record[key] and key not in free), None)
    if changed:
        raise MixfuseError(
            f"{out} holds a run to resume whose {changed!r} is {before.get(changed)!r}, not {record[changed]!r}; "
            "set it back, choose another `out`, or remove the folder to start over"
        )


def processes_of(checkpoint: Path) -> int:
    """The number of processes that wrote a whole checkpoint."""
    return int(read_json(checkpoint / WHOLE)["processes"])


def step(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints() -> "TrainerCallback":
    """A callback that marks every finished checkpoint, and removes half-written and old ones.

    transformers' own rotation (`save_total_limit`) must be off: it runs on rank 0 while other ranks still write, and
    counts half-written checkpoints.
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

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            whole_state.write(model, checkpoint, leads=state.is_world_process_zero)
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
            torch.distributed.barrier()  # no rank continues, or ends its process, before the mark is written

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
    """Flushes a checkpoint's files and folder entries to the disk."""
    for path in (checkpoint, *checkpoint.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
