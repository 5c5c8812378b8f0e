"""The factors of an adapter directory, read a module at a time, and inner products of B·A without building it.

A module's change to the base is Δ = (alpha/r)·B·A, as large as the base's own matrix: 400 MB in float32 for one of
8x22B's. Its norm, and the inner product of two changes, need only matrices of r columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.adapter_weights import safetensors_header
from mixfuse.contracts.bounded_json import read_object, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named
from mixfuse.contracts.peft_config import MOST_CONFIG_BYTES

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where in the model a module is; `expert` is None for attention."""

    layer: int
    expert: int | None
    projection: str

    @property
    def order(self) -> tuple[int, int, str]:
        """A sort key in the order of computation: attention before experts."""
        return self.layer, -1 if self.expert is None else self.expert, self.projection


class Pair(NamedTuple):
    """The factors of one module, float32; `b` includes the scale alpha/r.

    Attributes:
        a: (r, in).
        b: (out, r).
    """

    a: torch.Tensor
    b: torch.Tensor


class TensorFile:
    """A safetensors file, read tensor by tensor with plain reads.

    Pages of a memory-mapped file would count as this process's memory until the kernel reclaims them.

    Raises:
        MixfuseError: The file is truncated or has a broken header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = safetensors_header(path)
        end = max((tensor["data_offsets"][1] for tensor in self.header.values()), default=0)
        self.data = path.stat().st_size - end
        """Offset of the first tensor's bytes."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Reads a tensor, or some of its rows, in its own dtype.

        Raises:
            MixfuseError: The tensor is quantised.
        """
        tensor = self.header[name]
        height, *inner = tensor["shape"]
        start, stop, _ = (rows or slice(None)).indices(height)
        row = (tensor["data_offsets"][1] - tensor["data_offsets"][0]) // max(height, 1)
        content = bytearray((stop - start) * row)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.data + tensor["data_offsets"][0] + start * row)
            view = memoryview(content)
            while view and (count := stream.readinto(view)):
                view = view[count:]
        return torch.frombuffer(content, dtype=self.dtype(name)).reshape(stop - start, *inner)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            MixfuseError: The dtype is not a plain float.
        """
        stored = self.header[name]["dtype"]
        if stored not in _DTYPES:
            raise MixfuseError(
                f"{self.path}: {name} is quantised ({stored}); merge into weights in bfloat16, float16 or float32 and "
                "quantise afterwards",
                kind="adapter",
            )
        return _DTYPES[stored]

    def count(self) -> int:
        """The number of elements in the file."""
        return sum(math.prod(tensor["shape"]) for tensor in self.header.values())


class Factors:
    """An adapter directory, verified. A module's factors are read on access.

    Args:
        directory: The adapter directory.

    Attributes:
        manifest: Its manifest.
        family: The base's.
        config: PEFT's config.
        scale: alpha/r.
        places: The name of each module, as PEFT writes it without `.lora_A.weight` → where the module is.

    Raises:
        MixfuseError: The directory is damaged, or not an adapter directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = contract.verify(directory)
        self.family = family_named(self.manifest.model_type)
        self.config: dict[str, Any] = read_object(directory / contract.CONFIG, most=MOST_CONFIG_BYTES)
        self.scale = float(self.config["lora_alpha"]) / self.manifest.rank
        self._file = TensorFile(directory / contract.WEIGHTS)
        names = (name.removesuffix(".lora_A.weight") for name in self._file.header if ".lora_A." in name)
        self.places = dict(sorted(((name, self._place(name)) for name in names), key=lambda item: item[1].order))
        self._check_experts()

    def __getitem__(self, module: str) -> Pair:
        a, b = (self._file.read(f"{module}.lora_{side}.weight").float() for side in "AB")
        return Pair(a, b * self.scale)

    def shape(self, module: str, side: str) -> list[int]:
        """The shape of a module's factor; `side` is "A" or "B"."""
        shape: list[int] = self._file.header[f"{module}.lora_{side}.weight"]["shape"]
        return shape

    def _check_experts(self) -> None:
        projections: dict[int, set[tuple[int, str]]] = defaultdict(set)
        for place in self.places.values():
            if place.expert is not None:
                projections[place.layer].add((place.expert, place.projection))
        experts = 1 + max((expert for members in projections.values() for expert, _ in members), default=0)
        for layer, members in projections.items():
            if len(members) < 3 * experts:  # exported by the first version of mixfuse
                raise MixfuseError(
                    f"{self.directory}: layer {layer} has factors of some experts only; export it again with: "
                    f"mixfuse adapter export {self.directory} OUT",
                    kind="adapter",
                )

    def _place(self, name: str) -> Place:
        match = self.family.adapter_module.search(name)
        if match is None:
            raise MixfuseError(
                f"{self.directory}: {shortened(name, 120)} is not a module of {self.family.title} that LoRA adapts",
                kind="adapter",
            )
        expert = match["expert"]
        return Place(int(match["layer"]), None if expert is None else int(expert), match["projection"])


def inner_product(first: Pair, second: Pair) -> float:
    """⟨Δ₁, Δ₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), in float64: the sum runs over r₁·r₂ numbers."""
    left = first.b.double().T @ second.b.double()
    right = first.a.double() @ second.a.double().T
    return float((left * right).sum())


def with_progress(names: Iterable[str], description: str) -> Iterable[str]:
    """The names, with a progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    return track(list(names), description, console=console, transient=True, disable=not console.is_terminal)
