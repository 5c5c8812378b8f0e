"""The judge protocol: how a comparison is written and how its verdict is read.

One pure module. Training builds preference pairs with it, the runtime judges with it, and its digest travels in a
judge adapter's manifest, so that the two cannot drift apart: a mismatch is refused at load.

A comparison shows the judge two anonymous answers, each behind a fence that carries a per-request nonce; the judge
replies with one verdict token. Answers are untrusted text: they cannot close their fence without knowing the nonce.
Each pair is judged in both orders, because judges favour a position (arXiv 2306.05685, section 3.3): a verdict that
flips with the order counts as a tie.
"""

import itertools
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from mixfuse.files import sha256_json

VERSION = "1"
# Short on purpose: a judge reads this frame twice for every pair of candidates.
SYSTEM = "Pick the better answer."
TEMPLATE = (
    "[question {nonce}]\n{question}\n"
    "[A {nonce}]\n{first}\n"
    "[B {nonce}]\n{second}\n"
    "[end {nonce}]\n"
    "Which answer is right or better, A or B?"
)
VERDICTS = ("A", "B")
ORDERS = "both"


def describe() -> dict[str, object]:
    """Everything that defines the protocol, as it goes into a judge's manifest."""
    return {
        "version": VERSION,
        "system": SYSTEM,
        "template": TEMPLATE,
        "verdicts": list(VERDICTS),
        "orders": ORDERS,
    }


def digest() -> str:
    """The hex SHA-256 of `describe()`; equal digests mean equal protocols."""
    return sha256_json(describe())


def new_nonce(*texts: str, draw: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """Returns a fresh fence nonce (4 hex digits) that occurs in none of `texts`.

    The texts are there before the nonce is drawn, so its length need not stand up to guessing. It grows only for a text
    that holds hardly anything but nonces: one of 64 KiB can hold every nonce of 4 digits.

    Args:
        texts: Everything that will stand between the fences.
        draw: Gives that many random bytes; training passes a seeded one.
    """
    nonces = (draw(2 + tries // 64).hex() for tries in itertools.count())
    return next(nonce for nonce in nonces if not any(nonce in text for text in texts))


def comparison(question: str, first: str, second: str, *, nonce: str) -> list[dict[str, str]]:
    """Writes one comparison as chat messages; the judge's next token is its verdict.

    Args:
        question: What was asked.
        first: The answer shown as A.
        second: The answer shown as B.
        nonce: From `new_nonce(question, first, second)`; must occur in neither answer.

    Raises:
        ValueError: An answer contains the nonce, and so could close its fence.
    """
    if nonce in first or nonce in second:
        raise ValueError("an answer contains the fence nonce")
    content = TEMPLATE.format(question=question, first=first, second=second, nonce=nonce)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def read_verdict(logprobs: Mapping[str, float]) -> float | None:
    """Reads a verdict from the natural-log probabilities of the candidates for the judge's first token.

    Args:
        logprobs: Token text → log-probability, typically the top 20. Spellings of one verdict with leading or trailing
            white space are added up.

    Returns:
        P(A) / (P(A) + P(B)), in [0, 1]; None where neither verdict is among the tokens (a parse failure).
    """
    mass = dict.fromkeys(VERDICTS, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in mass:
            mass[token.strip()] += math.exp(logprob)
    total = sum(mass.values())
    return mass[VERDICTS[0]] / total if total > 0 else None


class Outcome(NamedTuple):
    """What both orders of one pair say together.

    Attributes:
        winner: "first", "second", or "tie" where the orders disagree, a verdict could not be read, or p is exactly ½.
        score: Mean probability, over the orders that could be read, that the first answer is better; ½ if none could.
        consistent: Both orders were read and name the same answer.
        parse_failures: How many of the two verdicts could not be read.
    """

    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int


def combine(forward: float | None, backward: float | None) -> Outcome:
    """Combines the two orders of one pair.

    Args:
        forward: P(A) with the first answer shown as A, or None.
        backward: P(A) with the *second* answer shown as A, or None.
    """
    views = [view for view in (forward, None if backward is None else 1.0 - backward) if view is not None]
    score = sum(views) / len(views) if views else 0.5
    if len(views) == 2 and all(view > 0.5 for view in views):
        return Outcome("first", score, True, 0)
    if len(views) == 2 and all(view < 0.5 for view in views):
        return Outcome("second", score, True, 0)
    return Outcome("tie", score, False, 2 - len(views))
