"""Fences around members' answers: anonymous, numbered, and closed only by who knows the request's nonce."""

from collections.abc import Sequence

from mixfuse.contracts.judge_protocol import MAX_CHARS, capped, neutral, new_nonce


def fenced(texts: Sequence[str], *, question: str, max_chars: int = MAX_CHARS, label: str = "answer") -> str:
    """Writes untrusted texts one below the other, each behind its own fence.

    What could act in them is made harmless and a long one is cut in its middle, as for the judge; nothing invisible is
    taken out, because what the reader of these writes is meant to keep an answer's script and its emoji.

    Args:
        texts: The answers, in the order to show them.
        question: Stands in the same prompt; the nonce occurs in neither.
        max_chars: The most of each answer to show.
        label: What the fences call a text.
    """
    texts = [capped(neutral(capped(text, 16 * max_chars)), max_chars) for text in texts]
    nonce = new_nonce(question, *texts)
    return "\n\n".join(
        f"<{label} {number} {nonce}>\n{text}\n</{label} {number} {nonce}>" for number, text in enumerate(texts, start=1)
    )
