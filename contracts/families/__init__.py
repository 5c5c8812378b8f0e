"""The families of mixture-of-experts models that mixfuse supports. Each module in this folder defines one as `FAMILY`.

To add a family, add its file; nothing else has to change. A family is suitable if these three hold:

- transformers 5 holds a layer's experts as `mlp.experts.gate_up_proj` (E, 2I, H) and `mlp.experts.down_proj`
  (E, H, I), with a top-K router, SiLU and no biases.
- Every layer has experts, and none has a shared expert.
- vLLM serves LoRA for each expert, with the names of the checkpoint.

`tests/train/test_families.py` runs training, export and the planners for every family in this folder, and
`tests/serve/test_families_served.py` serves one in vLLM.
"""

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mixfuse.contracts.bounded_json import read_object
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.family import Family, Shape


@cache
def known_families() -> Mapping[str, Family]:
    """Returns every family by its `model_type`."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    families: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in modules}
    return MappingProxyType(dict(sorted(families.items())))


def family_named(model_type: Any) -> Family:
    """Returns the family with this `model_type`.

    Raises:
        MixfuseError: The family is unknown.
    """
    families = known_families()
    if not isinstance(model_type, str) or model_type not in families:
        raise MixfuseError(f"model type {repr(model_type)[:60]} is not supported; supported are {', '.join(families)}")
    return families[model_type]


_MOST_CONFIG_BYTES = 4 << 20


def config_of(base: Path) -> dict[str, Any]:
    """Reads the `config.json` of a base model's folder.

    Raises:
        MixfuseError: It is missing, no regular file, or no JSON object of a config's size.
    """
    try:
        return read_object(base / "config.json", most=_MOST_CONFIG_BYTES)
    except MixfuseError as error:
        raise MixfuseError(str(error)) from None  # the fault of no adapter


def family_of(base: Path) -> Family:
    """Returns the family of the base model in a folder.

    Raises:
        MixfuseError: The family is unknown.
    """
    try:
        return family_named(config_of(base).get("model_type"))
    except MixfuseError as error:
        raise MixfuseError(f"{base}: {error}", kind=error.kind) from None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Reads the sizes in a `config.json`.

    Raises:
        MixfuseError: The family is unknown, the config selects a variant that is not supported, or a size is missing.
    """
    if not isinstance(config, Mapping):
        raise MixfuseError(f"config.json holds no JSON object, but {type(config).__name__}")
    return family_named(config.get("model_type")).shape(config)
