"""Fences around members' answers: anonymous, numbered, and closable only with the request's nonce."""

from collections.abc import Sequence

from mixfuse.contracts.judge_protocol import MAX_CHARS, capped, neutral, new_nonce


def fenced(texts: Sequence[str], *, question: str, max_chars: int = MAX_CHARS, label: str = "answer") -> str:
    """Joins untrusted texts, each between its own fences.

    As for the judge, fence marks and chat tokens in them are neutralized and a long text is cut in its middle.
    Invisible characters stay, unlike for the judge: the model that reads these texts writes an answer from them, and
    many scripts and emoji need such characters.

    Args:
        texts: The answers, in order.
        question: The question in the same prompt; the nonce occurs neither in it nor in the texts.
        max_chars: The most characters of each answer to show.
        label: The name of a text in the fences.
    """
    texts = [capped(neutral(capped(text, 16 * max_chars)), max_chars) for text in texts]
    nonce = new_nonce(question, *texts)
    return "\n\n".join(
        f"<{label} {number} {nonce}>\n{text}\n</{label} {number} {nonce}>" for number, text in enumerate(texts, start=1)
    )
