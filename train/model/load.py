"""Loads a base model for training under ZeRO-3, and compares the loaded weights with the checkpoint."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of, family_of
from mixfuse.contracts.family import Family
from mixfuse.train.model import expert_lora
from mixfuse.train.model.family_classes import classes_of
from mixfuse.train.model.quantised import pack
from mixfuse.train.model.quantised_experts import SCALES, built, quantise
from mixfuse.train.model.tokenizer import load_tokenizer  # noqa: F401 - for those who load the base, too
from mixfuse.train.quantization import QUANTIZATION_BLOCK, Quantization
from mixfuse.train.recipe import Lora


def load_base(
    base: Path, dtype: torch.dtype, *, attention: str = "sdpa", quantization: Quantization | None = None
) -> Any:
    """Loads the base and checks every weight of it. It is partitioned if a DeepSpeed config with ZeRO-3 is active.

    With `quantization`, the experts are packed as they are read (`quantised_experts.py`).

    Each MoE block becomes a ZeRO-3 leaf, which is gathered whole. The experts that a rank uses depend on its data, and
    ranks that gather different parameters would wait for each other forever (DeepSpeed #4966, #5008).

    Raises:
        MixfuseError: The folder holds no model of a known family, or a weight was not loaded from the checkpoint.
    """
    if not (base / "config.json").is_file():
        raise MixfuseError(
            f"{base} is not a model folder (no config.json); put a model's files there, or build the demo's small "
            f"base with: mixfuse base build {base}"
        )
    family = family_of(base)
    family.shape(config_of(base))  # refuses variants that are not supported
    expert_lora.register()
    settings = {
        "dtype": dtype,
        "attn_implementation": attention,
        "experts_implementation": expert_lora.EXPERTS_IMPLEMENTATION,
    }
    model = (_partitioned if is_deepspeed_zero3_enabled() else _whole)(base, family, settings, quantization)
    check_loaded(model, base, quantization=quantization)
    mark_leaves(model)
    return model


def _whole(base: Path, family: Family, settings: dict[str, Any], quantization: Quantization | None) -> Any:
    """Loads the whole base in this process, as transformers does."""
    try:
        model, info = classes_of(family.model_type).causal_lm.from_pretrained(
            base, output_loading_info=True, local_files_only=True, use_safetensors=True, **settings
        )
    except (RuntimeError, SafetensorError) as error:  # e.g. an expert is missing, so the experts cannot be stacked
        raise MixfuseError(f"{base}: the checkpoint does not load: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise MixfuseError(f"{base}: {problem.replace('_', ' ')} on loading, e.g. {sorted(info[problem])[0]!r}")
    if quantization:
        quantise(model, quantization)
    return model


def _partitioned(base: Path, family: Family, settings: dict[str, Any], quantization: Quantization | None) -> Any:
    """Loads the base into ZeRO-3's partitions: each process reads the rows of each tensor that its partition holds.

    transformers 5.19 would stack all experts of the checkpoint in every process before it fills the model
    (`_apply_weight_conversions_to_state_dict`): 271 GB per process for 8x22B. Here nothing is gathered or sent.

    A partition that is not plain memory (hpZ has a second one, NVMe has none, qwZ holds other codes) is filled by
    DeepSpeed: rank 0 reads the module, the others receive their parts. All ranks check names and shapes first, so that
    no rank waits for another that has stopped with an error.
    """
    classes = classes_of(family.model_type)
    config = classes.config.from_pretrained(base, local_files_only=True)
    config.name_or_path = str(base)
    partitioning = Init(config_dict_or_path=deepspeed_config())
    with no_init_weights(), built(quantization), partitioning, set_zero3_state():
        model = classes.causal_lm._from_config(config, **settings)
    model.tie_weights()
    checkpoint = Checkpoint(base, family)
    checkpoint.check_names({name: weight.shape for name, weight in _weights(dict(model.named_parameters()))})
    is_first = torch.distributed.get_rank() == 0
    loaded: set[int] = set()
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.ds_id not in loaded}
        loaded.update(parameter.ds_id for parameter in own.values())
        rest = []
        for name, weight in _weights(own):
            if all(map(has_plain_partition, weight.parts)):
                weight.fill_partitions(f"{prefix}.{name}", checkpoint, quantization)
            else:
                rest.append((f"{prefix}.{name}", weight))
        parts = [parameter for _, weight in rest for parameter in weight.parts]
        with GatheredParameters(parts, modifier_rank=0, enabled=bool(parts)):
            if is_first:
                for name, weight in rest:
                    for index, key in checkpoint.pieces_of(name, weight.shape):
                        weight.fill(index, checkpoint.tensor(key), quantization)
    return model.eval()


class _Weight(NamedTuple):
    """A weight of the base: one parameter, or one with its codes and one with its scales."""

    parameter: torch.nn.Parameter
    scales: torch.nn.Parameter | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, whole."""
        held = tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))
        if self.scales is None:
            return held
        return (*held[:-1], getattr(self.scales, "ds_shape", self.scales.shape)[-1] * QUANTIZATION_BLOCK)

    @property
    def parts(self) -> tuple[torch.nn.Parameter, ...]:
        """The parameters that hold it."""
        return (self.parameter,) if self.scales is None else (self.parameter, self.scales)

    def fill(self, index: tuple[int | slice, ...], stored: torch.Tensor, kind: Quantization | None) -> None:
        """Writes a tensor of the checkpoint to its place."""
        if self.scales is None or kind is None:
            self.parameter.data[index].copy_(stored)
            return
        self.parameter.data[index], self.scales.data[index] = self._packed(stored, kind)

    def fill_partitions(self, name: str, checkpoint: "Checkpoint", kind: Quantization | None) -> None:
        """Reads this process's parts. Of packed weights, it reads the whole blocks in which its codes lie."""
        if self.scales is None or kind is None:
            fill_partition(self.parameter, name, checkpoint)
            return
        for place, held in enumerate((self.parameter, self.scales)):
            weights = math.prod(self.shape) // cast(Any, held).ds_numel

            def read(key: str, first: int, last: int, place: int = place, weights: int = weights) -> torch.Tensor:
                start = first * weights // QUANTIZATION_BLOCK * QUANTIZATION_BLOCK
                stop = -(-last * weights // QUANTIZATION_BLOCK) * QUANTIZATION_BLOCK
                found = self._packed(checkpoint.elements(key, start, stop), kind)[place]
                return found[first - start // weights : last - start // weights]

            fill_partition(held, name, checkpoint, shape=self.shape, read=read)

    def has_first_row(self, index: tuple[int | slice, ...], row: torch.Tensor, kind: Quantization | None) -> bool:
        """Whether the first row of this place is that of the checkpoint."""
        held = self.parameter.data[index][0]
        if self.scales is None or kind is None:
            return bool(torch.equal(held.flatten().cpu(), row.to(held.dtype)))
        codes, scales = self._packed(row, kind)
        pairs = ((held, codes), (self.scales.data[index][0], scales))
        return all(torch.equal(_bytes(one), _bytes(other)) for one, other in pairs)

    def _packed(self, stored: torch.Tensor, kind: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.parameter.dtype
        return pack(stored.to(self.parameter.device, dtype), kind, dtype)


def _bytes(held: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes; as numbers, codes may be unequal to themselves."""
    return held.reshape(-1).view(torch.uint8)


def _weights(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, _Weight]]:
    """The weights that these parameters hold, by name."""
    for name, parameter in parameters.items():
        if name.removesuffix(SCALES) == name or name.removesuffix(SCALES) not in parameters:
            yield name, _Weight(parameter, parameters.get(name + SCALES))


def has_plain_partition(parameter: Any) -> bool:
    """Whether this process's part of a parameter is one flat tensor in memory, of the parameter's own type."""
    part = parameter.ds_tensor
    return (
        parameter.ds_secondary_tensor is None
        and part.final_location is None
        and part.dtype == parameter.dtype
        and part.numel() == part.ds_numel
        and not hasattr(part, "ds_quant_scale")
    )


@torch.no_grad()
def fill_partition(
    parameter: Any,
    name: str,
    checkpoint: "Checkpoint",
    *,
    shape: Sequence[int] | None = None,
    read: Callable[[str, int, int], torch.Tensor] | None = None,
) -> None:
    """Reads this process's part of a parameter: of its elements in their order, the rank-th of equal parts.

    Args:
        parameter: The parameter.
        name: The name of its weight.
        checkpoint: Where it is read from.
        shape: The weight's shape, if an element of the parameter stands for several weights, side by side in a row.
        read: Gives the parameter's elements from one to another of a stored tensor; by default the tensor's own.
    """
    part, shape = parameter.ds_tensor, tuple(shape or parameter.ds_shape)
    read, weights = read or checkpoint.elements, math.prod(shape) // parameter.ds_numel  # in an element
    start = part.ds_numel * parameter.ds_zero_partition_rank
    stop = min(start + part.ds_numel, parameter.ds_numel)  # the last part is padded
    for index, key in checkpoint.pieces_of(name, shape):
        place = torch.empty(shape, device="meta")[index]  # contiguous: a whole parameter, a matrix, or rows of one
        begin = place.storage_offset() // weights
        first, last = max(start, begin), min(stop, begin + place.numel() // weights)
        if first < last:
            part[first - start : last - start].copy_(read(key, first - begin, last - begin))


def mark_leaves(model: Any) -> None:
    """Makes each MoE block a ZeRO-3 leaf module.

    Raises:
        MixfuseError: A layer has no such block.
    """
    set_z3_leaf_modules(model, [classes_of(model.config.model_type).block])
    leaves = get_z3_leaf_modules(model)
    if len(leaves) != model.config.num_hidden_layers:
        raise MixfuseError(
            f"{len(leaves)} of {model.config.num_hidden_layers} MoE blocks are ZeRO-3 leaves; training would hang"
        )


def lora_config(family: Family, lora: Lora, chosen: Sequence[Sequence[int]] | None = None) -> LoraConfig:
    """Turns a recipe's `lora` into PEFT's config.

    In transformers 5 the experts are 3-D parameters without modules, which PEFT reaches by `target_parameters`. A
    wildcard such as `all-linear` would miss them or train the router, so every target is named.

    Args:
        family: The base's family.
        lora: The recipe's `lora`.
        chosen: For each layer, the experts to adapt (`choose_experts.choose_for_run`); None if the recipe names them.

    Raises:
        MixfuseError: The recipe leaves the choice to the data, and `chosen` is None.
    """
    by_layer: dict[int, Sequence[int]] | None = None  # None: all
    targets: list[str] | None = list(family.expert_parameters)
    if lora.experts == "none":
        targets = None
    elif chosen is not None:
        by_layer = {layer: experts for layer, experts in enumerate(chosen) if experts}
    elif isinstance(lora.experts, dict):
        by_layer = dict(lora.experts)
    elif lora.experts == "auto":
        raise MixfuseError(
            "lora.experts is auto, and the experts have not been chosen; call choose_experts.choose_for_run first"
        )
    if by_layer is not None:
        targets = [f"layers.{layer}.{parameter}" for layer in by_layer for parameter in family.expert_parameters]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        target_modules=list(family.attention) if lora.attention else [],
        target_parameters=targets,
    )
    expert_lora.attach(config, by_layer)
    return config


def check_loaded(model: Any, base: Path, *, quantization: Quantization | None = None) -> None:
    """Compares the first row of every weight with the checkpoint, to find weights that still have their random values.

    transformers' own report is not enough: it has reported success under ZeRO-3 while experts kept their random values
    (transformers #43257). One module is gathered at a time. Every rank must call this.

    Raises:
        MixfuseError: A weight differs from the checkpoint.
    """
    checkpoint = Checkpoint(base, family_of(base))
    wrong: list[str] = []
    for prefix, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        partitioned = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
        with GatheredParameters(partitioned, enabled=bool(partitioned)):
            for name, weight in _weights(parameters):
                full = f"{prefix}.{name}" if prefix else name
                if full == "lm_head.weight" and model.config.tie_word_embeddings:
                    continue
                for index, key in checkpoint.pieces_of(full, weight.shape):
                    if not weight.has_first_row(index, checkpoint.first_row(key), quantization):
                        wrong.append(full)
                        break
    if wrong:
        raise MixfuseError(
            f"{base}: {len(wrong)} weights differ from the checkpoint after loading, e.g. {wrong[0]!r}; "
            "they would have been trained from their random initialisation"
        )


class Checkpoint:
    """The tensors of a safetensors checkpoint, by their stored or their transformers 5 names; read one at a time.

    Raises:
        MixfuseError: A file is truncated.
    """

    def __init__(self, base: Path, family: Family) -> None:
        self._base = base
        self._family = family
        self._files: dict[str, Any] = {}
        for path in sorted(base.glob("*.safetensors")):
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, RuntimeError) as error:
                raise MixfuseError(f"{path}: the checkpoint does not load: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def pieces_of(self, name: str, shape: Sequence[int]) -> list[tuple[tuple[int | slice, ...], str]]:
        """Returns the parts of a parameter: the index of each, and the name of its stored tensor."""
        if name in self._files:
            return [((), name)]
        pieces = self._family.checkpoint_pieces(name, experts=shape[0])
        if pieces is None:
            return [((), self._family.checkpoint_name(name))]
        rows = {0: slice(shape[1] // 2), 1: slice(shape[1] // 2, None)}
        return [((expert,) if half is None else (expert, rows[half]), key) for expert, half, key in pieces]

    def check_names(self, shapes: dict[str, Sequence[int]]) -> None:
        """Checks that the stored tensors are those of these parameters, with their shapes.

        Raises:
            MixfuseError: A tensor is missing, is unexpected or has another shape.
        """
        unexpected = set(self._files)
        for name, shape in shapes.items():
            for index, key in self.pieces_of(name, shape):
                expected = list(torch.empty(tuple(shape), device="meta")[index].shape)
                stored = self._slice(key).get_shape()
                if stored != expected:
                    raise MixfuseError(f"{self._base}: {key} has shape {stored}, and {name} needs {expected}")
                unexpected.discard(key)
        if unexpected:
            raise MixfuseError(f"{self._base}: unexpected keys on loading, e.g. {min(unexpected)!r}")

    def tensor(self, key: str) -> torch.Tensor:
        """Reads a whole stored tensor."""
        return self._slice(key)[:]

    def elements(self, key: str, first: int, last: int) -> torch.Tensor:
        """Reads elements of a stored tensor, from `first` to before `last` in their order: the rows that hold them."""
        stored = self._slice(key)
        row = math.prod(stored.get_shape()[1:])
        rows: torch.Tensor = stored[first // row : -(-last // row)]
        begin = first // row * row
        return rows.flatten()[first - begin : last - begin]

    def first_row(self, key: str) -> torch.Tensor:
        """Reads the first row of a stored tensor, flattened."""
        row: torch.Tensor = self._slice(key)[0:1]
        return row.flatten()

    def _slice(self, key: str) -> Any:
        if key not in self._files:
            raise MixfuseError(f"{self._base}: the checkpoint has no tensor {key!r}; it is incomplete")
        return self._files[key].get_slice(key)
