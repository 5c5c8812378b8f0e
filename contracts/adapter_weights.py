"""The tensors of an adapter file, read without torch: the header of a safetensors file, and what the weights do.

The server checks adapters with this module before an engine loads them. In an engine a number that is not finite
spreads beyond its own requests: through the cache of keys and values it can reach other requests of the same batch
(benchmarks/hot_swap.py saw a judge's verdict lost to it), and so does one that overflows the engine's own dtype.
"""

import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy
import numpy.typing

from mixfuse.contracts import peft_config
from mixfuse.contracts.bounded_json import open_regular, parse_object, read_object, reading_in, shortened
from mixfuse.contracts.errors import MixfuseError

Array = numpy.typing.NDArray[numpy.float32]
MAX_DELTA = 4.0
"""Largest norm of alpha/r·B·A, in norms of the base's weight; trained adapters change 0.001 to 0.3 of it."""
MAX_RMS = 1000.0
"""The same without a base to compare with: the root mean square of alpha/r·B·A. A base's weight has 0.01 to 0.1."""
MIN_DELTA = 2.0**-24
"""Smallest norm of alpha/r·B·A, in norms of the base's weight, that float32 can show; bfloat16 needs 2**-9."""
MIN_RMS = 1e-10
"""The same without a base to compare with, as a root mean square."""
_MOST_HEADER_BYTES = 32 << 20
_MOST_TENSORS = 100_000  # on every expert of Qwen3-235B there are 73,000
_MOST_METADATA = 10_000
_SAMPLE = 1 << 14
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_READ = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.40e38}
"""Each number format of an engine → its largest number."""


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a safetensors file's header: tensor name → `{dtype, shape, data_offsets}`.

    Raises:
        MixfuseError: The file is no regular file, truncated or not a safetensors file.
    """
    with open_regular(path) as stream:
        start = stream.read(8)
        size = os.fstat(stream.fileno()).st_size
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
        if length > min(_MOST_HEADER_BYTES, size):
            raise _not_whole(path, "its header is too long" if length > size else "its header is larger than 32 MiB")
        content = stream.read(length)
    tensors = content.count(b'"data_offsets"')
    if tensors > _MOST_TENSORS:
        raise _not_whole(path, f"it lists more than {_MOST_TENSORS} tensors")
    if content.count(b'":') > 4 * tensors + _MOST_METADATA:  # of each tensor the name, dtype, shape and data_offsets
        raise _not_whole(path, f"its header has more than {_MOST_METADATA} keys that are of no tensor")
    source = f"{path}: not a whole safetensors file: its header"
    header = parse_object(content, source, containers=3 * _MOST_TENSORS + _MOST_METADATA)
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in header.items():
        if problem := _damage(tensor, size - 8 - length):
            raise _not_whole(path, f"{name[:120]!r} {problem}")
        end = max(end, tensor["data_offsets"][1])
    reached = 0
    for first, last in sorted(tensor["data_offsets"] for tensor in header.values()):
        if first != reached:
            raise _not_whole(path, "its tensors overlap or leave gaps")
        reached = last
    if size != 8 + length + end:
        raise _not_whole(path, "truncated")
    return header


def _damage(tensor: Any, size: int) -> str | None:
    """What is wrong with one entry of a header; None if nothing is."""
    if not isinstance(tensor, dict):
        return "is no tensor"
    dtype, shape, offsets = tensor.get("dtype"), tensor.get("shape"), tensor.get("data_offsets")
    if not isinstance(dtype, str):
        return "has no dtype"
    if not _are_sizes(shape) or len(shape) > 8:
        return "has no shape" if shape is None else "has a shape that is none"
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        return "has no data_offsets" if offsets is None else "lies outside the file, which is truncated"
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != offsets[1] - offsets[0]:
        return "has a shape that does not fit its bytes"
    return None


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _not_whole(path: Path, what: str) -> MixfuseError:
    return MixfuseError(f"{path}: not a whole safetensors file ({what})", kind="adapter")


class Tensors:
    """A safetensors file, read tensor by tensor into float32.

    Raises:
        MixfuseError: As `safetensors_header`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, safetensors_header(path)
        with open_regular(path) as stream:
            self._data = 8 + int(struct.unpack("<Q", stream.read(8))[0])

    def read(self, name: str, start: int = 0, count: int | None = None) -> Array | None:
        """Reads some elements of a tensor, or all in its shape; None if it is not a plain float.

        Args:
            name: The tensor.
            start: The first element.
            count: How many elements, as one row; None: all.
        """
        tensor = self.header[name]
        if tensor["dtype"] not in _READ:
            return None
        kind = numpy.dtype(_READ[tensor["dtype"]])
        total = math.prod(tensor["shape"])
        wanted = total - start if count is None else count
        with open_regular(self.path) as stream:
            stream.seek(self._data + tensor["data_offsets"][0] + start * kind.itemsize)
            values = numpy.fromfile(stream, dtype=kind, count=wanted)
        if values.size != wanted:
            raise _not_whole(self.path, "it was changed while it was being read")
        if tensor["dtype"] == "BF16":
            values = (values.astype(numpy.uint32) << 16).view(numpy.float32)
        with numpy.errstate(over="ignore"):
            floats: Array = values.astype(numpy.float32, copy=False)
        return floats.reshape(tensor["shape"]) if count is None else floats


class BaseNorms:
    """The norms of a base model's weights, estimated from samples: cheap at 281 GB.

    Args:
        base: The base's folder.
    """

    def __init__(self, base: Path) -> None:
        self._files = [Tensors(path) for path in sorted(base.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.header}
        self._modules = {name.rpartition(".")[0] for name in self._where}
        self._kinds = set(map(_numberless, self._modules))

    def fault(self, module: str, shape: list[int]) -> str | None:
        """Why a change of this shape fits no weight of this name; None if it fits, or the base does not tell.

        Args:
            module: The module, in the names of the base's checkpoint.
            shape: Rows and columns of the change.
        """
        if module not in self._modules:  # a base of one file of several, or of other names, tells nothing
            return "which the base does not have" if _numberless(module) in self._kinds else None
        file = self._where.get(f"{module}.weight")
        if file is None or file.header[f"{module}.weight"]["dtype"] not in _READ:
            return None  # quantised
        own = file.header[f"{module}.weight"]["shape"]
        return None if own == shape else f"whose weight has shape {own} in the base"

    def rms(self, module: str) -> float | None:
        """The root mean square of a weight; None if the base has none of this name, or it is quantised.

        Args:
            module: The module, in the names of the base's checkpoint.
        """
        name = f"{module}.weight"
        if name not in self._where:
            return None
        file = self._where[name]
        total = math.prod(file.header[name]["shape"])
        count = min(total, _SAMPLE)
        found = [file.read(name, start, count) for start in {0, (total - count) // 2, total - count}]
        parts = [part.astype(numpy.float64) for part in found if part is not None]
        return math.sqrt(sum(float((part**2).mean()) for part in parts) / len(parts)) if parts else None


def _numberless(module: str) -> str:
    """A module's name without the numbers of its layer and expert."""
    return re.sub(r"\d+", "#", module)


@cache
def base_norms(base: Path) -> BaseNorms:
    """The norms of a base; its headers are read once."""
    return BaseNorms(base)


def check_pairs(
    pairs: Iterable[tuple[str, Array, Array]],
    folder: Path,
    scale: float,
    *,
    base: Path | None = None,
    dtype: str | None = None,
) -> None:
    """Checks what an adapter's weights would do in an engine.

    Args:
        pairs: The name of each module that is adapted, as vLLM applies it, with its A, (r, in), and B, (out, r).
        folder: The adapter's folder, for messages.
        scale: The factor on every B·A.
        base: The base model's folder. Without it the change is held to `MAX_RMS`.
        dtype: The engine's number format: float32, bfloat16 or float16; None if it is not known.

    Raises:
        MixfuseError: A weight is NaN or infinite, too large for the dtype, fits no weight of the base, or changes the
            base more than any training does; or the whole adapter does nothing (`kind` "adapter").
    """
    norms = base_norms(base.resolve()) if base is not None else None
    most = _LARGEST.get(dtype or "float32", _LARGEST["float32"])
    does_something = False
    for module, a, b in pairs:
        for side, factor, largest in (("A", a, most), ("B", b, most / max(scale, 1.0))):
            top = float(numpy.abs(factor).max(initial=0.0))
            if not math.isfinite(top):
                raise _bad(folder, f"{module}.lora_{side}.weight holds NaN or infinity; the training diverged")
            if top > largest:
                raise _bad(
                    folder,
                    f"{module}.lora_{side}.weight overflows {dtype or 'float32'} (it holds {top:.3g}, scale {scale:g})",
                )
        name = module.removeprefix("base_model.model.")
        if norms and (wrong := norms.fault(name, [b.shape[0], a.shape[1]])):
            raise _bad(folder, f"it changes {name} by a matrix of shape [{b.shape[0]}, {a.shape[1]}], {wrong}")
        norm = scale * delta_norm(a, b)
        elements = math.sqrt(b.shape[0] * a.shape[1])
        own = norms.rms(name) if norms else None
        does_something |= norm > (MIN_DELTA * own if own else MIN_RMS) * elements
        if own and norm > MAX_DELTA * own * elements:
            raise _bad(
                folder,
                f"{module} changes the base's weight by {norm / (own * elements):.3g} times its own norm; no training "
                f"changes it by more than {MAX_DELTA:g}",
            )
        if not own and norm > MAX_RMS * elements:
            raise _bad(
                folder,
                f"{module} changes each number of the base's weight by {norm / elements:.3g} on average, more than any "
                "training does",
            )
    if not does_something:
        raise _bad(
            folder,
            "every product of B and A is zero, or too small for float32, so the adapter does nothing; train it first",
        )


def delta_norm(a: Array, b: Array) -> float:
    """‖B·A‖ (Frobenius), from products of r columns, in float64."""
    left = b.astype(numpy.float64).T @ b.astype(numpy.float64)
    right = a.astype(numpy.float64) @ a.astype(numpy.float64).T
    return math.sqrt(max(float((left * right).sum()), 0.0))


def _pairs(tensors: Tensors, folder: Path) -> Iterator[tuple[str, Array, Array]]:
    for name in tensors.header:
        if ".lora_A." not in name:
            continue
        a, b = tensors.read(name), tensors.read(name.replace(".lora_A.", ".lora_B."))
        if a is None or b is None:
            dtype = tensors.header[name if a is None else name.replace(".lora_A.", ".lora_B.")]["dtype"]
            raise _bad(folder, f"{name} is of type {dtype}; adapters are F32, F16 or BF16")
        yield name.removesuffix(".lora_A.weight"), a, b


def check_directory(directory: Path, *, base: Path | None = None, dtype: str | None = None) -> None:
    """Checks the weights of a verified adapter directory as `check_pairs` does; reads all, a module at a time."""
    with reading_in(directory):
        config = read_object(directory / "adapter_config.json", most=peft_config.MOST_CONFIG_BYTES, follow=False)
        pairs = _pairs(Tensors(directory / "adapter_model.safetensors"), directory)
        check_pairs(pairs, directory, peft_config.scale(config), base=base, dtype=dtype)


def _bad(folder: Path, what: str) -> MixfuseError:
    """An error in a line of some length, whatever tensors are called."""
    return MixfuseError(f"{folder}: {shortened(what, 500)}", kind="adapter")
