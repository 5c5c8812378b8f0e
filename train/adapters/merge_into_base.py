"""Merging an adapter into its base: W + (alpha/r)·B·A, file by file, in memory that does not grow with the model.

The merged checkpoint has the base's files, with the same tensors at the same offsets. Tensors that the adapter changes
are summed while they are copied, a block of rows at a time. Sums are in float32 and rounded once to the base's dtype.
`docs/adapter-directory.md` has the formula for the memory.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.adapter import PARITY_TOLERANCE
from mixfuse.contracts.bounded_json import read_object
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_file, disk_errors, read_json, write_json
from mixfuse.train.adapters.factors import Factors, Pair, TensorFile

RECORD = "merge.json"
_INDEX = "model.safetensors.index.json"
_BLOCK_BYTES = 1 << 25  # of a block of rows in float32
_COPY_BYTES = 1 << 24  # copied at once
_COPIED = (".json", ".jinja", ".txt", ".model")
# Times the base's size in float32: the model, PEFT's copy of a layer's experts, and the overhead of loading.
_CHECK_MEMORY = 2.5


class Check(NamedTuple):
    """The merged checkpoint in plain transformers compared with PEFT: worst differences of log-probs, in nats.

    Attributes:
        difference: To PEFT's own merge, rounded to the base's dtype.
        rounding: To the adapter without merging, which is the effect of rounding to that dtype.
        effect: Between the adapter and the base alone.
    """

    difference: float
    rounding: float
    effect: float


class Merged(NamedTuple):
    """The result of `merge`.

    Attributes:
        tensors: Number of tensors that it changed.
        files: Number of weight files.
        check: The comparison with PEFT, or None if it was skipped.
        skipped: The reason for skipping it.
    """

    tensors: int
    files: int
    check: Check | None
    skipped: str | None


def merge(directory: Path, out: Path, *, base: Path | None = None, check: bool | None = None) -> Merged:
    """Writes the base with an adapter added to it; resumes an interrupted merge.

    The folder is `OUT.partial` until the merge is complete. A second call reuses the finished files in it.

    Args:
        directory: An adapter directory.
        out: The folder to create: a checkpoint that plain transformers and vLLM load.
        base: The base model; by default the path in the manifest.
        check: Compare log-probabilities with PEFT's; by default if memory allows it.

    Raises:
        MixfuseError: The directory is damaged or belongs to another base, the base is quantised or lacks a tensor,
            `out` exists, the disk is too small, or the merged model differs from PEFT's.
    """
    if out.exists():
        raise MixfuseError(f"{out} exists already; choose another place or remove it first")
    factors = Factors(directory)
    base = base or Path(factors.manifest.base_path)
    if not (base / "config.json").is_file():
        raise MixfuseError(f"the base model {str(base)!r} is not here; name it with --base")
    fingerprint = contract.fingerprint(base)
    if parts := factors.manifest.base.differences(fingerprint):
        raise MixfuseError(f"{directory}: made on another base model (its {', '.join(parts)} differ)", kind="adapter")
    files = [TensorFile(path) for path in _weight_files(base)]
    modules_by_tensor = _modules_by_tensor(factors, files)
    partial = out.with_name(out.name + ".partial")
    _open_partial(partial, factors, fingerprint.model_dump(mode="json"))
    done = {file.path.name for file in files if (partial / file.path.name).is_file()}
    _check_space(partial, sum(file.path.stat().st_size for file in files if file.path.name not in done))
    with _progress() as progress:
        bar = progress.add_task("merging", total=sum(file.path.stat().st_size for file in files))
        for file in files:
            if file.path.name in done:
                progress.advance(bar, file.path.stat().st_size)
                continue
            with atomic_file(partial / file.path.name) as temporary, temporary.open("wb") as stream:
                _merge_file(file, stream, factors, modules_by_tensor, lambda count: progress.advance(bar, count))
    with disk_errors(partial):
        for path in base.iterdir():
            if path.is_file() and path.suffix in _COPIED and path.name != RECORD:
                shutil.copyfile(path, partial / path.name)
    skipped = _reason_to_skip_check(files, check=check)
    comparison = None if skipped else _compare_with_peft(directory, base, partial, files[0])
    os.replace(partial, out)
    return Merged(len(modules_by_tensor), len(files), comparison, skipped)


def _weight_files(base: Path) -> list[Path]:
    """The files that transformers loads: those of the index, or all without an index."""
    if (base / _INDEX).is_file():
        named = read_object(base / _INDEX, most=contract.MOST_TEXT_BYTES).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise MixfuseError(f"{base / _INDEX}: has no weight_map")
        names = set(named.values())
        return [base / name for name in sorted(names)]
    return sorted(base.glob("*.safetensors"))


def _modules_by_tensor(factors: Factors, files: list[TensorFile]) -> dict[str, str]:
    """The checkpoint's name of each tensor that changes → the adapter's module.

    Raises:
        MixfuseError: The base lacks a tensor, or it has another shape or is quantised.
    """
    file_of = {name: file for file in files for name in file.header}
    names = {f"{module.removeprefix('base_model.model.')}.weight": module for module in factors.places}
    for name, module in names.items():
        if name not in file_of:
            raise MixfuseError(
                f"{factors.directory}: the base has no tensor {name!r}; its checkpoint is not in "
                f"{factors.family.title}'s own names ({', '.join(factors.family.expert_projections)} of each expert)",
                kind="adapter",
            )
        a, b = (factors.shape(module, side) for side in "AB")
        if file_of[name].header[name]["shape"] != [b[0], a[1]]:
            raise MixfuseError(f"{factors.directory}: {module} does not fit the base's {name}", kind="adapter")
        file_of[name].dtype(name)  # refuses a quantised tensor before anything is written
    return names


def _open_partial(partial: Path, factors: Factors, base: dict[str, Any]) -> None:
    """Creates the folder, or reopens the one of an interrupted merge of the same adapter and base.

    Raises:
        MixfuseError: The folder belongs to another merge.
    """
    manifest = factors.manifest
    record = {
        "adapter": manifest.revision,
        "role": manifest.role,
        "judge_protocol": manifest.judge_protocol,
        "training_data": [entry.model_dump(mode="json") for entry in manifest.training_data],
        "base": base,
    }
    if partial.exists():
        if not (partial / RECORD).is_file() or read_json(partial / RECORD) != record:
            raise MixfuseError(f"{partial} belongs to another merge; remove it, or choose another place")
        for leftover in partial.glob(".*.partial"):  # of a process that was killed
            leftover.unlink()
        return
    with disk_errors(partial):
        partial.mkdir(parents=True)
    write_json(partial / RECORD, record)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MixfuseError(
            f"no disk space left to write {folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            kind="disk",
        )


def _merge_file(
    file: TensorFile,
    out: IO[bytes],
    factors: Factors,
    modules_by_tensor: dict[str, str],
    advance: Callable[[int], object],
) -> None:
    """Copies a weight file, merging as it goes. The header is unchanged, as are names, dtypes and shapes."""
    with file.path.open("rb") as source:
        _copy(source, out, file.data, advance)
        for name, tensor in sorted(file.header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = tensor["data_offsets"]
            if name in modules_by_tensor:
                _merge_tensor(file, name, factors[modules_by_tensor[name]], out)
                advance(end - start)
            else:
                source.seek(file.data + start)
                _copy(source, out, end - start, advance)


def _merge_tensor(file: TensorFile, name: str, pair: Pair, out: IO[bytes]) -> None:
    rows, columns = file.header[name]["shape"]
    step = max(1, _BLOCK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        weight = file.read(name, block)
        merged = weight.float().addmm_(pair.b[block], pair.a).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise MixfuseError(f"{file.path}: with the adapter, {name} no longer fits {weight.dtype}", kind="adapter")
        out.write(merged.view(torch.uint8).numpy().data)


def _copy(source: IO[bytes], out: IO[bytes], count: int, advance: Callable[[int], object]) -> None:
    while count:
        if not (data := source.read(min(count, _COPY_BYTES))):
            raise MixfuseError(f"{source.name}: the file became shorter while it was read")
        out.write(data)
        count -= len(data)
        advance(len(data))


def _reason_to_skip_check(files: list[TensorFile], *, check: bool | None) -> str | None:
    if check is False:
        return "--no-check"
    needed = _CHECK_MEMORY * 4 * sum(file.count() for file in files)
    free = psutil.virtual_memory().available
    if check is None and needed > free:
        return f"it would take about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _compare_with_peft(directory: Path, base: Path, merged: Path, file: TensorFile) -> Check:
    """Compares the merged checkpoint with PEFT's own merge, one model in memory at a time, float32.

    Raises:
        MixfuseError: They differ by more than the tolerance.
    """
    from transformers import AutoModelForCausalLM

    from mixfuse.train.adapters.parity import logprobs, peft_model, probe_prompts, worst_difference
    from mixfuse.train.model.tokenizer import load_tokenizer

    dtype = next(file.dtype(name) for name in file.header)
    prompts = probe_prompts(load_tokenizer(base))
    with Console(stderr=True).status("comparing with PEFT"):
        model: Any = peft_model(directory, base)
        adapted = logprobs(model, prompts)
        with model.disable_adapter():
            unadapted = logprobs(model, prompts)
        model = model.merge_and_unload()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        peft_merged = logprobs(model, prompts)
        del model
        plain, info = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise MixfuseError(f"{merged}: transformers misses weights in it, or finds unexpected ones")
        ours = logprobs(plain.eval(), prompts)
    comparison = Check(
        difference=worst_difference(ours, peft_merged),
        rounding=worst_difference(ours, adapted),
        effect=worst_difference(adapted, unadapted),
    )
    if not comparison.difference <= PARITY_TOLERANCE:
        raise MixfuseError(
            f"{merged}: the merged model's log-probs differ from PEFT's by {comparison.difference:.1e}, more than "
            f"{PARITY_TOLERANCE:.0e}; it is left there for inspection",
            kind="parity",
        )
    return comparison


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
