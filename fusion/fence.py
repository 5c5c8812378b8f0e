"""Fences around members' answers: anonymous, numbered, and closed only by who knows the request's nonce."""

from collections.abc import Sequence

from mixfuse.judge_protocol import new_nonce


def fenced(texts: Sequence[str], *, question: str, label: str = "answer") -> str:
    """Writes untrusted texts one below the other, each behind its own fence.

    Args:
        texts: The answers, in the order to show them.
        question: Stands in the same prompt; the nonce occurs in neither.
        label: What the fences call a text.
    """
    nonce = new_nonce(question, *texts)
    return "\n\n".join(
        f"<{label} {number} {nonce}>\n{text}\n</{label} {number} {nonce}>" for number, text in enumerate(texts, start=1)
    )
