"""PEFT's `adapter_config.json`: which adapters nobody can serve as they are, and why; which modules it names.

Every key that vLLM 0.32 refuses (`vllm/lora/peft_helper.py`) is refused here first, and so are the keys of peft 0.21
that change what an adapter computes while vLLM takes no notice of them. The server checks adapters with this module, so
it imports neither.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.linear_patterns import Pattern

MOST_CONFIG_BYTES = 4 << 20
MAX_SCALE = 1024.0
"""Largest alpha/r, or alpha/√r with rsLoRA. Trainings use 0.5 to 64; beyond this, alpha is damaged."""
_MOST_NAMES = 20_000
MOST_PATTERNS = 256
"""Most names of `rank_pattern` and `alpha_pattern` that are regular expressions; each is compiled."""
_MOST_PATTERN_CHARACTERS = 8192  # unsloth's have 600; of megabytes, RE2 fills the screen with its own complaints
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")
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
START_KEYS = ("eva_config", "corda_config", "loftq_config", "lora_ga_config")
"""Keys that only set the start of A and B. With a plain start, what is saved does not depend on them."""
KNOWN_KEYS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config",
})  # fmt: skip
"""The keys that peft 0.21 writes for a LoRA."""
OTHER_TOOLS_KEYS = frozenset({"lora_B_layout", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "swift_version"})
"""Keys of unsloth and ms-swift: of the training only, or heeded by whoever reads the adapter."""


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
    if not isinstance(kind, str) or kind != "LORA":
        method = "it has no peft_type" if kind is None else f"it is a {shortened(_text(kind), 80)} adapter"
        yield Refusal(f"{method}; only LoRA can be served (peft_type: LORA)", vllm=False, peft=kind is not None)
        return
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        found = "no rank 'r'" if rank is None else f"{_shown(rank)} for the rank 'r'"
        yield Refusal(f"its adapter_config.json has {found}; it must be a whole number from 1", vllm=False, peft=False)
        return
    if rank > MOST_RANK:
        yield Refusal(f"its rank is {_shown(rank)}; vLLM serves ranks up to {MOST_RANK}", vllm=False, peft=True)
    yield from _types(config)
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
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        yield Refusal(
            f"its task_type is {_shown(task)}; only adapters that write text (CAUSAL_LM) can be served",
            vllm=False,
            peft=True,
        )
    if config.get("target_modules") is None and not config.get("target_parameters"):
        yield Refusal("its adapter_config.json has no target_modules", vllm=False, peft=False)


def _types(config: Mapping[str, Any]) -> Iterator[Refusal]:
    """Refuses values of a type that PEFT or vLLM would misread, such as "false", which is true."""
    for keys, words, fits in _TYPES:
        for key in keys:
            value = config.get(key)
            if value is not None and not fits(value):
                yield Refusal(f"its {key} is {_shown(value)}; it must be {words}", vllm=False, peft=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


_TYPES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "inference_mode"),
        "true or false",
        lambda value: isinstance(value, bool),
    ),
    (("target_modules", "exclude_modules", "layers_pattern"), "a pattern or a list of names",
     lambda value: _is_text(value) or _are_texts(value)),
    (("target_parameters",), "a list of names", _are_texts),
    (("modules_to_save",), "a list of names", lambda value: _is_text(value) or _are_texts(value)),
    (("layers_to_transform",), "a layer's number or a list of them",
     lambda value: _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))),
    (("rank_pattern", "alpha_pattern", "auto_mapping", "megatron_config", *START_KEYS), "an object",
     lambda value: isinstance(value, dict)),
    (("base_model_name_or_path", "peft_version", "revision", "task_type", "bias"), "a text", _is_text),
)  # fmt: skip


class Targets:
    """Which modules and parameters PEFT would adapt with a config (peft 0.21, `check_target_module_exists`).

    Args:
        config: The config, without a refusal.

    Raises:
        ValueError: A pattern of it does not match in linear time, or is none; the message names its key.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._modules = _matcher(config, "target_modules", every=EVERY_LINEAR)
        self._excluded = _matcher(config, "exclude_modules")
        self._parameters = _matcher(config, "target_parameters")
        layers = config.get("layers_to_transform")
        self._layers = {layers} if isinstance(layers, int) else set(layers or ())
        if isinstance(config.get("target_modules"), str):
            self._layers = set()  # PEFT refuses both together
        pattern = config.get("layers_pattern") or []
        names = [pattern] if isinstance(pattern, str) else pattern
        if len(names) > MOST_PATTERNS or not all(map(is_plain_name, names)):
            raise ValueError("layers_pattern")
        self._layer = re.compile(rf"(?:^|.*?\.)(?:{'|'.join(map(re.escape, names)) or '[^.]*'})\.(?P<layer>\d+)\.")

    def module(self, name: str) -> bool:
        """Whether PEFT adapts a module, named as in the model (`model.layers.0.self_attn.q_proj`)."""
        if self._excluded(name) or not self._modules(name):
            return False
        if not self._layers:
            return True
        match = self._layer.match(name)
        return match is not None and int(match["layer"]) in self._layers

    def parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter, named as in the model."""
        return self._parameters(name)


EVERY_LINEAR = "all-linear"


def _matcher(config: Mapping[str, Any], key: str, *, every: str | None = None) -> Callable[[str], bool]:
    """Whether a module has one of the names of a key, whole or from a dot on, or matches its pattern whole."""
    names = config.get(key) or []
    if isinstance(names, str):
        if names == every:
            return lambda name: True
        try:
            if len(names) > _MOST_PATTERN_CHARACTERS:
                raise ValueError
            return Pattern(rf"^(?:{names})$").found_in
        except ValueError:
            raise ValueError(key) from None
    whole = frozenset(names)
    return lambda name: any(end in whole for end in endings(name))


def is_plain_name(name: str) -> bool:
    """Whether a name of a pattern is a module's own, with no sign of a regular expression but its dots."""
    return _PLAIN_NAME.fullmatch(name) is not None


def endings(name: str) -> Iterable[str]:
    """A dotted name, whole and from each of its dots on."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _scale(config: Mapping[str, Any], rank: int) -> Iterator[Refusal]:
    """Checks alpha, and the ranks and alphas of single modules."""
    root = bool(config.get("use_rslora"))
    alpha = config.get("lora_alpha")
    if not _is_number(alpha):
        what = "has no 'lora_alpha'" if alpha is None else f"has {_shown(alpha)} for 'lora_alpha'"
        yield Refusal(f"its adapter_config.json {what}; it must be a number above 0", vllm=False, peft=False)
        return
    yield from _alpha(alpha, "lora_alpha", rank, root=root)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            continue  # `_types` refuses it
        if len(pattern) > _MOST_NAMES:
            yield Refusal(f"its {key} names more than {_MOST_NAMES} modules", vllm=True, peft=True)
            continue
        if sum(not is_plain_name(name) for name in pattern) > MOST_PATTERNS:
            what = f"its {key} holds more than {MOST_PATTERNS} patterns that are no plain names"
            yield Refusal(what, vllm=True, peft=True)
            continue
        for name, value in pattern.items():
            where = f"{key} {_shown(name)}"
            try:
                if len(name) > _MOST_PATTERN_CHARACTERS:
                    raise OverflowError
                if not is_plain_name(name):
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
