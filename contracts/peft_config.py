"""PEFT's `adapter_config.json`: which adapters nobody can serve as they are, and why.

Every key that vLLM 0.32 refuses (`vllm/lora/peft_helper.py`) is refused here first, and so are the keys of peft 0.21
that change what an adapter computes while vLLM takes no notice of them. The server checks adapters with this module, so
it imports neither.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from mixfuse.contracts.bounded_json import shortened

MOST_CONFIG_BYTES = 4 << 20
MAX_SCALE = 1024.0
"""Largest alpha/r, or alpha/√r with rsLoRA. Trainings use 0.5 to 64; beyond this, alpha is damaged."""
_MOST_PATTERNS = 20_000
MOST_RANK = 512  # vLLM 0.32, `MaxLoRARanks`

PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that set the start of A and B only. What is saved then is a plain LoRA."""
_MOVED_STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ"}
_CHANGING = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "a bias beside B (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "arrow_config": "Arrow's routing of adapters (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}


class Refusal(NamedTuple):
    """Why an adapter cannot be served.

    Attributes:
        what: What is wrong and what to do, a clause without its subject.
        vllm: Whether vLLM would apply the adapter as it was trained.
        peft: Whether PEFT applies the adapter as it was trained.
    """

    what: str
    vllm: bool
    peft: bool


def refusals(config: Mapping[str, Any]) -> Iterator[Refusal]:
    """Yields each reason for which an adapter with this config cannot be served."""
    kind = config.get("peft_type")
    if str(kind) != "LORA":
        method = shortened(_text(kind), 80)
        yield Refusal(f"it is a {method} adapter; only LoRA can be served", vllm=False, peft=kind is not None)
        return
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        found = "no rank 'r'" if rank is None else f"{_shown(rank)} for the rank 'r'"
        yield Refusal(f"its adapter_config.json has {found}; it must be a whole number from 1", vllm=False, peft=False)
        return
    if rank > MOST_RANK:
        yield Refusal(f"its rank is {_shown(rank)}; vLLM serves ranks up to {MOST_RANK}", vllm=False, peft=True)
    yield from _scale(config, rank)
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS and str(start).lower() not in PLAIN_STARTS:
        name = next((title for key, title in _MOVED_STARTS.items() if str(start).lower().startswith(key)), None)
        yield Refusal(
            f"it starts from {name or 'an unknown start'} (init_lora_weights: {_shown(start)}), which changes the "
            "base's weights; convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
            vllm=False,
            peft=name is not None,
        )
    for key, title in _CHANGING.items():
        if config.get(key):
            yield Refusal(f"{title} cannot be served by vLLM; train without it", vllm=False, peft=True)
    bias = config.get("bias", "none")
    if bias not in ("none", None):
        yield Refusal(f"bias: {_shown(bias)} cannot be served by vLLM; train without it", vllm=False, peft=True)
    if saved := config.get("modules_to_save"):
        yield Refusal(
            f"modules_to_save: {_shown(saved)} cannot be served by vLLM; train LoRA alone", vllm=False, peft=True
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list | str | None) or (targets is None and not config.get("target_parameters")):
        yield Refusal("its adapter_config.json has no target_modules", vllm=False, peft=False)
    for key in ("target_modules", "target_parameters"):
        names = config.get(key)
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            yield Refusal(f"its {key} are not all names", vllm=False, peft=False)
    if not isinstance(config.get("target_parameters"), list | None):
        yield Refusal("its target_parameters are no list", vllm=False, peft=False)


def _scale(config: Mapping[str, Any], rank: int) -> Iterator[Refusal]:
    """Checks alpha, and the ranks and alphas of single modules."""
    root = bool(config.get("use_rslora"))
    alpha = config.get("lora_alpha")
    if not _is_number(alpha):
        yield Refusal("its adapter_config.json has no 'lora_alpha'", vllm=False, peft=False)
        return
    yield from _alpha(alpha, "lora_alpha", rank, root=root)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            yield Refusal(f"its {key} is no object", vllm=False, peft=False)
            continue
        if len(pattern) > _MOST_PATTERNS:
            yield Refusal(f"its {key} names more than {_MOST_PATTERNS} modules", vllm=True, peft=True)
            continue
        for name, value in pattern.items():
            where = f"{key} {_shown(name)}"
            try:
                re.compile(name)
                re.compile(rf"(.*\.)?({name})$")  # as peft 0.21 does in `get_pattern_key`
            except (re.error, RecursionError, OverflowError):
                yield Refusal(f"{where} is no pattern", vllm=False, peft=False)
                break
            if key == "alpha_pattern":
                if not _is_number(value):
                    yield Refusal(f"{where}: {_shown(value)} is no number", vllm=False, peft=False)
                    break
                if found := list(_alpha(value, where, 1 if root else rank, root=root)):
                    yield found[0]
                    break
            elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_RANK:
                yield Refusal(f"{where}: {_shown(value)} is no rank", vllm=False, peft=False)
                break


def _alpha(alpha: float, name: str, rank: int, *, root: bool) -> Iterator[Refusal]:
    """Refuses an alpha that is no number, does nothing, or is absurd."""
    if alpha == 0:
        yield Refusal(f"{name} is 0, so the adapter does nothing", vllm=True, peft=True)
    elif not 0 < alpha < float("inf"):  # also NaN
        yield Refusal(f"{name} is {_shown(alpha)}; it must be a finite number above 0", vllm=True, peft=True)
    elif alpha > MAX_SCALE * (min(rank, MOST_RANK) ** 0.5 if root else rank):
        yield Refusal(
            f"{name} is {_shown(alpha)} at rank {_shown(rank)}, a scale above {MAX_SCALE:g}, which no training uses",
            vllm=True,
            peft=True,
        )


def scale(config: Mapping[str, Any]) -> float:
    """The factor on B·A of a checked config without patterns: alpha/r, or alpha/√r with rsLoRA."""
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return shortened(repr(value) if isinstance(value, str | list | dict) else _text(value), 80)


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
