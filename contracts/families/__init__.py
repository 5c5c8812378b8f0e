"""The families of mixture-of-experts models that mixfuse knows: each module in this folder describes one as `FAMILY`.

To add a family, add its file. A family fits where transformers 5 keeps a layer's experts as `mlp.experts.gate_up_proj`
(E, 2I, H) and `mlp.experts.down_proj` (E, H, I) beside a top-K router, with SiLU and without biases, and where vLLM
serves LoRA for each expert under the names of the checkpoint. `tests/train/test_families.py` shows for each family that
training, export and serving agree.
"""

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.family import Family, Shape
from mixfuse.contracts.files import read_json


@cache
def known_families() -> Mapping[str, Family]:
    """Every family, by its `model_type`."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    families: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in modules}
    return MappingProxyType(dict(sorted(families.items())))


def family_named(model_type: Any) -> Family:
    """The family of that `model_type`.

    Raises:
        MixfuseError: mixfuse does not know it.
    """
    families = known_families()
    if model_type not in families:
        raise MixfuseError(f"a {model_type!r} model; mixfuse knows the model types {', '.join(families)}")
    return families[model_type]


def family_of(base: Path) -> Family:
    """The family of a base model's folder.

    Raises:
        MixfuseError: mixfuse does not know it.
    """
    try:
        return family_named(read_json(base / "config.json").get("model_type"))
    except MixfuseError as error:
        raise MixfuseError(f"{base}: {error}", kind=error.kind) from None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Reads the sizes in a `config.json`.

    Raises:
        MixfuseError: The model is of no known family, a variant that is not supported, or a size is missing.
    """
    return family_named(config.get("model_type")).shape(config)
