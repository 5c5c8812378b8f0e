"""The judge protocol: how a comparison is written and how its verdict is read.

One pure module. Training builds preference pairs with it, the runtime judges with it, and its digest travels in a
judge adapter's manifest, so that the two cannot drift apart: a mismatch is refused at load.

A comparison shows the judge two anonymous answers, each behind a fence that carries a per-request nonce; the judge
replies with one verdict token. Answers are untrusted text: they cannot close their fence without knowing the nonce.
Each pair is judged in both orders, because judges favour a position (arXiv 2306.05685, section 3.3): a verdict that
flips with the order counts as a tie.

What an answer holds beside words is made harmless first, in training and in judging alike: tokens that a chat template
gives a meaning, lines that pose as a fence or as another speaker, characters that a reader would not see; and a long
answer is cut in its middle, with a mark. The answer that is returned to a user is never touched.
"""

import functools
import itertools
import math
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.strict_yaml import Strict

VERSION = "2"
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
EXPLAIN = "First say why in one or two sentences, then end with the line 'Verdict: A' or 'Verdict: B'."
"""Added to a comparison for a judge that writes a rationale before its verdict; no part of the protocol's digest."""
MAX_CHARS = 12_000
"""The most of one answer that a judge is shown, in characters: about 3000 tokens of English."""

# Special tokens, by the models that know them. Found by a tokenizer in the middle of a text, each would end the user's
# turn or open another speaker's. A space after the first character is enough to make it plain text.
_TOKENS = re.compile(
    r"<[|\uff5c][^<>\n]{1,64}[|\uff5c]>"  # ChatML, Llama 3, Phi, gpt-oss; DeepSeek with wide bars
    r"|</?(?:s|bos|eos|pad|unk|mask|think|tool_call|tool_response|start_of_turn|end_of_turn)>"  # Mistral, Gemma, Qwen
    r"|<</?SYS>>"  # Llama 2
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|ARGS|THINK|IMG"
    r"|IMG_BREAK|IMG_END|PREFIX|MIDDLE|SUFFIX|control_\d+)\]",  # Mistral
    re.IGNORECASE,
)
_VERDICT_LINE = re.compile(r"(?:^|\n|[.!?] )[*_ ]*Verdict[*_ ]*:[*_ ]*([AB])[*_.]*\s*\Z")
# Lines that pose as a fence of ours: the judge's, or those of `mixfuse.fusion.answering.fence`.
_FENCES = re.compile(
    r"^([ \t]*)(\[(?:question|A|B|end)\b[^\]\n]{0,80}\]|</?answer\b[^>\n]{0,80}>)", re.MULTILINE | re.IGNORECASE
)
# Lines that pose as another speaker.
_ROLES = re.compile(
    r"^[ \t]*(?:\#{1,6}[ \t]*|[*_]{1,3})?"
    r"(?:system|user|assistant|human|ai|developer|tool|instruction|response|input|judge|verdict)"
    r"[*_]{0,3}[ \t]*:",
    re.MULTILINE | re.IGNORECASE,
)
# Control characters; Unicode's format characters (category Cf) but for the few that have a shape; fillers and blanks
# that are letters by category; variation selectors; tags; half surrogate pairs.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_ENDS = re.compile(r"\r\n?|[\x85\u2028\u2029]")
# What follows stays on the line of the mark, so that no cut puts anything at the beginning of a line.
_CUT = "\n[… the middle of this text was left out …] "


class Calibration(Strict):
    """What a judge's probabilities are divided by and rounded with; measured on a dev split, kept in its manifest.

    Attributes:
        temperature: The log-odds of a verdict are divided by it (Guo et al. 2017, arXiv 1706.04599); 1 changes nothing.
        tie_margin: A pair whose order-averaged score lies within this of 1/2 is a tie; 0 leaves every verdict as it is.
    """

    temperature: float = Field(default=1.0, gt=0)
    tie_margin: float = Field(default=0.0, ge=0, lt=0.5)


def describe() -> dict[str, object]:
    """Everything that defines the protocol, as it goes into a judge's manifest."""
    return {
        "version": VERSION,
        "system": SYSTEM,
        "template": TEMPLATE,
        "verdicts": list(VERDICTS),
        "orders": ORDERS,
        "max_chars": MAX_CHARS,
        "made_harmless": sha256_json(
            [one.pattern for one in (_TOKENS, _FENCES, _ROLES, _INVISIBLE, _LINE_ENDS)] + [_CUT]
        ),
    }


def digest() -> str:
    """The hex SHA-256 of `describe()`; equal digests mean equal protocols."""
    return sha256_json(describe())


def neutral(text: str, *, speakers: bool = True) -> str:
    """Takes the power out of what a text holds beside words: special tokens, forged fences, forged speakers.

    It stays readable: a token or fence gets a space after its first character, a speaker's line becomes a quotation.
    Doing it twice changes nothing more.

    Args:
        text: Text of any origin.
        speakers: Whether lines that pose as another speaker are quoted; a conversation's own transcript has them.
    """
    if "<" in text or "[" in text:
        text = _TOKENS.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        text = _FENCES.sub(lambda found: f"{found[1]}{found[2][0]} {found[2][1:]}", text)
    if speakers and ":" in text:
        text = _ROLES.sub(lambda found: f"> {found[0]}", text)
    return text


def visible(text: str) -> str:
    """The text without the characters a reader would not see (zero-width, bidirectional, tags, controls).

    Joiners go too, so a composed emoji falls apart and some scripts join otherwise: for a judge's eyes only. Every
    kind of line end becomes a newline.
    """
    return _LINE_ENDS.sub("\n", _INVISIBLE.sub("", text))


def capped(text: str, max_chars: int = MAX_CHARS) -> str:
    """The text, or its beginning and its end around a mark; never longer than that.

    Args:
        text: Any text.
        max_chars: The most characters to keep, the mark among them; at least 100.
    """
    if len(text) <= max_chars:
        return text
    keep = max_chars - len(_CUT)
    head = keep * 2 // 3  # the end is where an answer says what it comes to
    return text[:head] + _CUT + text[len(text) - (keep - head) :]


def shown(text: str, max_chars: int = MAX_CHARS) -> str:
    """An answer as a judge is shown it: what cannot be seen is gone, what could act is not, and it has an end.

    Doing it twice changes nothing more. An answer of many times that length is cut before it is read: whoever wrote it
    shall not have the gateway work through megabytes.
    """
    return _shown(capped(text, 16 * max_chars), max_chars)


@functools.lru_cache(maxsize=64)  # a candidate is shown once for every verdict that it takes part in
def _shown(text: str, max_chars: int) -> str:
    return capped(neutral(visible(text)), max_chars)


def new_nonce(*texts: str, draw: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """Returns a fresh fence nonce (4 hex digits) that occurs in none of `texts`.

    The texts are there before the nonce is drawn, so its length need not stand up to guessing. It grows only for a text
    that holds hardly anything but nonces: one of 64 KiB can hold every nonce of 4 digits.

    Args:
        texts: Everything that will stand between the fences, as it is or as it will be shown.
        draw: Gives that many random bytes; training passes a seeded one.
    """
    nonces = (draw(2 + tries // 64).hex() for tries in itertools.count())
    # Taking out what cannot be seen can put a nonce together.
    written = {variant for text in texts for variant in (text, visible(text))}
    return next(nonce for nonce in nonces if not any(nonce in text for text in written))


def comparison(
    question: str, first: str, second: str, *, nonce: str, max_chars: int = MAX_CHARS
) -> list[dict[str, str]]:
    """Writes one comparison as chat messages; the judge's next token is its verdict.

    Args:
        question: What was asked; whole, special tokens made harmless.
        first: The answer shown as A; see `shown`.
        second: The answer shown as B.
        nonce: From `new_nonce(question, first, second)`; must occur in neither answer.
        max_chars: The most of each answer to show, where the judge's context is too short for the protocol's own.

    Raises:
        ValueError: An answer contains the nonce, and so could close its fence.
    """
    question, first, second = neutral(question, speakers=False), shown(first, max_chars), shown(second, max_chars)
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


def explained(comparison: list[dict[str, str]]) -> list[dict[str, str]]:
    """A comparison that asks for a rationale before the verdict."""
    return [*comparison[:-1], {**comparison[-1], "content": f"{comparison[-1]['content']}\n{EXPLAIN}"}]


def read_explained(text: str) -> str | None:
    """The verdict, A or B, that a rationale ends with; None where its last line names none."""
    found = _VERDICT_LINE.search(text)
    return found[1] if found else None


class Outcome(NamedTuple):
    """What both orders of one pair say together.

    Attributes:
        winner: "first", "second", or "tie" where the orders disagree, a verdict could not be read, or the score lies
            within the calibration's margin of ½.
        score: Mean probability, over the orders that could be read, that the first answer is better; ½ if none could.
        consistent: Both orders were read and name the same answer.
        parse_failures: How many of the two verdicts could not be read.
    """

    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int


def probability(log_odds: float) -> float:
    """The probability of those log-odds."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def combine(forward: float | None, backward: float | None, calibration: Calibration | None = None) -> Outcome:
    """Combines the two orders of one pair.

    Args:
        forward: P(A) with the first answer shown as A, or None.
        backward: P(A) with the *second* answer shown as A, or None.
        calibration: The judge's: the temperature is applied to the log-odds of each view, the margin to their mean.
            It cannot turn a verdict round; it can make one a tie.
    """
    calibration = calibration or Calibration()
    read = (forward, None if backward is None else 1.0 - backward)
    views = [_tempered(view, calibration.temperature) for view in read if view is not None]
    score = sum(views) / len(views) if views else 0.5
    tied = calibration.tie_margin > 0 and abs(score - 0.5) <= calibration.tie_margin
    consistent = len(views) == 2 and (all(view > 0.5 for view in views) or all(view < 0.5 for view in views))
    winner: Literal["first", "second", "tie"] = "tie"
    if consistent and not tied:
        winner = "first" if score > 0.5 else "second"
    return Outcome(winner, score, consistent, 2 - len(views))


def _tempered(view: float, temperature: float) -> float:
    if temperature == 1.0 or view in {0.0, 1.0}:  # certain at any temperature
        return view
    return probability((math.log(view) - math.log1p(-view)) / temperature)
