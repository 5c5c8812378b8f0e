"""From a trainer to a PEFT adapter folder: the adapter is gathered from all ranks, checked, and written."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_json

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "peft", "trl", "deepspeed", "mixfuse")


def gather_adapter(trainer: Any) -> "dict[str, torch.Tensor]":
    """Gathers every LoRA tensor, whole, on the CPU, under PEFT's saved names. All ranks must call this.

    Reading partitioned tensors without gathering them gives empty adapter files under ZeRO-3 (DeepSpeed #7900,
    PEFT #453).
    """
    from deepspeed.runtime.zero import GatheredParameters

    if hasattr(trainer.model_wrapped, "empty_partition_cache"):
        # An evaluation's last forward pass reads parameters ahead for a backward pass that never comes. They stay in
        # flight, and DeepSpeed 0.19.8 fails below: "Cannot partition a param in flight". Seen on the embedded base on
        # two processes (scripts/demo); the tiny base does not show it.
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


def save_peft(model: Any, weights: "dict[str, torch.Tensor]", out: Path) -> None:
    """Writes a plain PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: The PEFT model, for its config and the names of its parameters.
        weights: What `gather_adapter` returned.
        out: An existing folder.
    """
    from safetensors.torch import save_file

    from mixfuse.train.model.expert_lora import as_plain_peft

    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    if config.get("target_parameters"):
        config["lora_dropout"] = 0.0  # only training uses it, and plain PEFT refuses dropout on these parameters
    write_json(out / "adapter_config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in as_plain_peft(model, weights).items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def check_weights(weights: "dict[str, torch.Tensor]", source: Path) -> None:
    """Refuses an adapter that would do nothing or break everything.

    Args:
        weights: Its tensors.
        source: The run or folder they come from, for messages.

    Raises:
        MixfuseError: There are no tensors, one is empty or holds NaN or infinity, or every B is zero (an untrained
            LoRA) or every A.
    """
    import torch

    if not weights or any(tensor.numel() == 0 for tensor in weights.values()):
        raise MixfuseError(
            f"{source}: the adapter is empty (ZeRO-3 partitions saved without gathering?)", kind="adapter"
        )
    broken = next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise MixfuseError(f"{source}: {broken} holds NaN or infinity; the training diverged", kind="adapter")
    for side in "BA":
        if not any(tensor.any() for name, tensor in weights.items() if f".lora_{side}." in name):
            raise MixfuseError(
                f"{source}: every lora_{side} is zero, so the adapter does nothing; train it first", kind="adapter"
            )


def library_versions() -> dict[str, str]:
    """Versions of the libraries an adapter is made with, for `run.json` and the manifest."""
    return {name: version(name) for name in LIBRARIES}
