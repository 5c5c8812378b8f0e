"""How many tokens a text has at most: by the model's own tokenizer where the config names one, else its bytes."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError

_LONGEST = 200_000
"""Characters; a longer text counts as its bytes, so that counting never holds up other requests for long."""


def count(text: str, tokenizer: Path | None = None) -> int:
    """Returns a text's tokens, or without a tokenizer its UTF-8 bytes: no token is shorter than a byte.

    Args:
        text: Any text.
        tokenizer: The model's `tokenizer.json`.
    """
    if tokenizer is None or len(text) > _LONGEST:
        return len(text.encode(errors="replace"))
    return _counted(text, tokenizer)


def check_tokenizer(path: Path) -> None:
    """Loads a tokenizer, so that a wrong path fails at the start.

    Raises:
        MixfuseError: The file cannot be read, or the package `tokenizers` is not installed.
    """
    _loaded(path)


@lru_cache(maxsize=256)  # the members of one family are sent the same texts
def _counted(text: str, tokenizer: Path) -> int:
    return len(_loaded(tokenizer).encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=16)
def _loaded(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MixfuseError(f"tokenizer {path}: the package `tokenizers` is not installed; install it") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain exceptions
        raise MixfuseError(f"tokenizer {path}: {error}; name a tokenizer.json") from None
