"""transformers' classes for each family in `contracts/families/`."""

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from mixfuse.contracts.families import family_named, known_families


class FamilyClasses(NamedTuple):
    """A family's classes in transformers.

    Attributes:
        config: The class of its config.
        causal_lm: The model with its output layer.
        decoder: The model without its output layer.
        block: A layer's MoE block: router and experts.
        experts: A layer's experts: two 3-D parameters.
        router: A layer's router. Its forward pass returns logits, the top K gate weights, and the top K indices.
    """

    config: Any
    causal_lm: Any
    decoder: Any
    block: Any
    experts: Any
    router: Any


@cache
def classes_of(model_type: str) -> FamilyClasses:
    """Imports the classes of one family.

    Raises:
        MixfuseError: The family is unknown.
    """
    family = family_named(model_type)
    package = f"transformers.models.{family.model_type}"
    modeling = import_module(f"{package}.modeling_{family.model_type}")
    configuration = import_module(f"{package}.configuration_{family.model_type}")
    parts = ("ForCausalLM", "Model", "SparseMoeBlock", "Experts", "TopKRouter")
    return FamilyClasses(
        getattr(configuration, f"{family.class_prefix}Config"),
        *(getattr(modeling, f"{family.class_prefix}{part}") for part in parts),
    )


@cache
def experts_classes() -> tuple[Any, ...]:
    """The experts classes of all families."""
    return tuple(classes_of(model_type).experts for model_type in known_families())


@cache
def router_classes() -> tuple[Any, ...]:
    """The router classes of all families."""
    return tuple(classes_of(model_type).router for model_type in known_families())


@cache
def block_classes() -> tuple[Any, ...]:
    """The MoE block classes of all families."""
    return tuple(classes_of(model_type).block for model_type in known_families())
