"""Fences around members' answers: anonymous, numbered, and closable only with the request's nonce."""

import re
from collections.abc import Sequence
from functools import lru_cache

from mixfuse.contracts.judge_protocol import MAX_CHARS, capped, neutral, new_nonce, special_tokens
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.config import ModelConfig

_special_tokens = lru_cache(maxsize=16)(special_tokens)


def own_tokens(model: ModelConfig) -> re.Pattern[str] | None:
    """Returns the control tokens of a model whose `tokenizer` the config names, as a pattern; None if it names none.

    Raises:
        MixfuseError: The file cannot be read.
    """
    return None if model.tokenizer is None else _special_tokens(model.tokenizer)


def refuses_tools(failure: CallError) -> bool:
    """Whether a model may have refused a conversation because its template knows no tool calls or results."""
    # Some engines say 500 where a template fails.
    return failure.kind == "bad_request" or (failure.kind == "upstream_error" and "HTTP 500" in str(failure))


def fenced(
    texts: Sequence[str],
    *,
    question: str,
    max_chars: int = MAX_CHARS,
    label: str = "answer",
    own: re.Pattern[str] | None = None,
) -> str:
    """Joins untrusted texts, each between its own fences.

    As for the judge, fence marks and chat tokens in them are neutralized and a long text is cut in its middle. Joiners
    and marks of direction stay, unlike for the judge: the model that reads these texts writes an answer from them, and
    many scripts and emoji need such characters.

    Args:
        texts: The answers, in order.
        question: All other text of the same prompt; the nonce occurs neither in it nor in the texts.
        max_chars: The most characters of each answer to show.
        label: The name of a text in the fences.
        own: The reader's own special tokens; see `mixfuse.contracts.judge_protocol.special_tokens`.
    """
    texts = [capped(neutral(capped(text, 16 * max_chars), own=own), max_chars) for text in texts]
    nonce = new_nonce(question, *texts)
    return "\n\n".join(
        f"<{label} {number} {nonce}>\n{text}\n</{label} {number} {nonce}>" for number, text in enumerate(texts, start=1)
    )
