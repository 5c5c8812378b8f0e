"""Loads a base's tokenizer with the chat template of the run; needs no torch model, so a recipe's check can do it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.contracts import chat_template as templates
from mixfuse.contracts.errors import MixfuseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(base: Path, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """Loads a base model's tokenizer and prepares its chat template (`contracts/chat_template.py: prepare`).

    Args:
        base: The base's folder.
        chat_template: The name of one of its templates, or a file; by default the base's own.

    Raises:
        MixfuseError: The tokenizer cannot be read, or it has no chat template that chats can be trained with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MixfuseError(f"{base}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    templates.prepare(tokenizer, base, chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
