"""Packages that only some installations have: one clear error where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from mixfuse.contracts.errors import MixfuseError


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Imports of optional packages go inside this block.

    Args:
        name: The extra of mixfuse that installs them.

    Raises:
        MixfuseError: One of them is not installed; the message holds the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MixfuseError(
            f"the package {error.name} is not installed; install it with: pip install 'mixfuse[{name}]'"
        ) from None
