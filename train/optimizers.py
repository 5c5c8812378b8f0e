"""The optimizers a recipe can name: one entry each.

An entry says which of transformers' optimizers runs and how much state it keeps, which `mixfuse plan` and
`mixfuse doctor` count. To add one, add an entry: the recipe's check, the docs' table of keys, training and planning all
read this table. It imports nothing heavy, because recipes do.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple


class OptimizerEntry(NamedTuple):
    """One optimizer.

    Attributes:
        transformers_name: The value of `TrainingArguments.optim`.
        state_bytes: Bytes of optimizer state for each trainable parameter under ZeRO-3, beside the float32 master
            weight. ZeRO-3 hands an optimizer flat, one-dimensional partitions in float32.
        adam_keys: Whether the recipe's `optimizer.betas` and `optimizer.eps` apply.
        arguments: The value of `TrainingArguments.optim_args`.
    """

    transformers_name: str
    state_bytes: int
    adam_keys: bool = False
    arguments: str | None = None


OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    # Both moments (AdamW, arXiv 1711.05101).
    "adamw": OptimizerEntry("adamw_torch", state_bytes=8, adam_keys=True),
    # Adafactor (arXiv 1804.04235) factors the second moment of matrices only. On ZeRO-3's flat partitions it keeps the
    # second moment whole, and no first moment.
    "adafactor": OptimizerEntry("adafactor", state_bytes=4),
    "sgd": OptimizerEntry("sgd", state_bytes=4, arguments="momentum=0.9"),
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[*OPTIMIZERS]  # pydantic and the docs' tables list the choices
