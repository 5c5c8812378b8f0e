"""The judge protocol: how a comparison is written and how its verdict is read.

Training builds preference pairs with this module, and the gateway judges with it. The protocol's digest is in a judge
adapter's manifest. An adapter with another digest is refused when it is loaded, so training and judging always agree.

A comparison shows the judge two anonymous answers, each between fences that carry a nonce of the request. The judge
replies with one verdict token. Answers are untrusted text: without the nonce they cannot close their fence. Each pair
is judged in both orders, because judges favour a position (arXiv 2306.05685, section 3.3). A verdict that flips with
the order counts as a tie.

An answer is neutralized before it is shown, in training and in judging: special tokens of chat templates, lines that
imitate a fence or another speaker, and invisible characters. A long answer loses its middle, and a mark stands in its
place. The answer that is returned to a user is never changed.
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
# Short, because a judge reads these words twice for every pair of candidates.
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
"""Added to a comparison for a judge that writes a rationale before its verdict; not part of the protocol's digest."""
MAX_CHARS = 12_000
"""The most characters of one answer that a judge is shown: about 3000 tokens of English."""

# Special tokens, with the models that use them. In the middle of a text, a tokenizer would read one as the end of the
# user's turn or as the start of another speaker's. A space after the first character makes it plain text.
_TOKENS = re.compile(
    r"<[|\uff5c][^<>\n]{1,64}[|\uff5c]>"  # ChatML, Llama 3, Phi, gpt-oss; DeepSeek with wide bars
    r"|</?(?:s|bos|eos|pad|unk|mask|think|tool_call|tool_response|start_of_turn|end_of_turn)>"  # Mistral, Gemma, Qwen
    r"|<</?SYS>>"  # Llama 2
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|ARGS|THINK|IMG"
    r"|IMG_BREAK|IMG_END|PREFIX|MIDDLE|SUFFIX|control_\d+)\]",  # Mistral
    re.IGNORECASE,
)
_VERDICT_LINE = re.compile(r"(?:^|\n|[.!?] )[*_ ]*Verdict[*_ ]*:[*_ ]*([AB])[*_.]*\s*\Z")
# Lines that imitate a fence: the judge's, or those of `mixfuse.fusion.answering.fence`.
_FENCES = re.compile(
    r"^([ \t]*)(\[(?:question|A|B|end)\b[^\]\n]{0,80}\]|</?answer\b[^>\n]{0,80}>)", re.MULTILINE | re.IGNORECASE
)
# Lines that imitate another speaker.
_ROLES = re.compile(
    r"^[ \t]*(?:\#{1,6}[ \t]*|[*_]{1,3})?"
    r"(?:system|user|assistant|human|ai|developer|tool|instruction|response|input|judge|verdict)"
    r"[*_]{0,3}[ \t]*:",
    re.MULTILINE | re.IGNORECASE,
)
# Control characters; Unicode's format characters (category Cf) except the few with a shape; fillers and blanks that
# are letters by category; variation selectors; tags; half surrogate pairs.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_ENDS = re.compile(r"\r\n?|[\x85\u2028\u2029]")
# The text after the cut continues on the line of the mark, so that a cut moves nothing to the beginning of a line.
_CUT = "\n[… the middle of this text was left out …] "


class Calibration(Strict):
    """How a judge's probabilities are corrected; fitted on a dev split and stored in the judge's manifest.

    Attributes:
        temperature: The log-odds of a verdict are divided by it (Guo et al. 2017, arXiv 1706.04599); 1 changes nothing.
        tie_margin: A pair is a tie if its order-averaged score is within this distance of 1/2; 0 changes nothing.
    """

    temperature: float = Field(default=1.0, gt=0)
    tie_margin: float = Field(default=0.0, ge=0, lt=0.5)


def describe() -> dict[str, object]:
    """Returns everything that defines the protocol, as it is stored in a judge's manifest."""
    return {
        "version": VERSION,
        "system": SYSTEM,
        "template": TEMPLATE,
        "verdicts": list(VERDICTS),
        "orders": ORDERS,
        "max_chars": MAX_CHARS,
        "made_harmless": sha256_json(
            [regex.pattern for regex in (_TOKENS, _FENCES, _ROLES, _INVISIBLE, _LINE_ENDS)] + [_CUT]
        ),
    }


def digest() -> str:
    """Returns the hex SHA-256 of `describe()`; equal digests mean equal protocols."""
    return sha256_json(describe())


def neutral(text: str, *, speakers: bool = True) -> str:
    """Neutralizes special tokens, forged fences and forged speakers in a text.

    The text stays readable: a token or fence gets a space after its first character, and a speaker's line becomes a
    quotation. A second call changes nothing more.

    Args:
        text: Text of any origin.
        speakers: Whether to quote lines that imitate another speaker. False for a conversation's own transcript, which
            has such lines.
    """
    if "<" in text or "[" in text:
        text = _TOKENS.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        text = _FENCES.sub(lambda match: f"{match[1]}{match[2][0]} {match[2][1:]}", text)
    if speakers and ":" in text:
        text = _ROLES.sub(lambda match: f"> {match[0]}", text)
    return text


def visible(text: str) -> str:
    """Removes invisible characters (zero-width, bidirectional, tags, controls); every line end becomes a newline.

    It also removes joiners, which splits composed emoji and changes some scripts, so only a judge is shown this text.
    """
    return _LINE_ENDS.sub("\n", _INVISIBLE.sub("", text))


def capped(text: str, max_chars: int = MAX_CHARS) -> str:
    """Returns the text, or, if it is longer than `max_chars`, its beginning and its end around a mark.

    Args:
        text: Any text.
        max_chars: The most characters to return, including the mark; at least 100.
    """
    if len(text) <= max_chars:
        return text
    keep = max_chars - len(_CUT)
    head = keep * 2 // 3  # a third for the end, where an answer states its result
    return text[:head] + _CUT + text[len(text) - (keep - head) :]


def shown(text: str, max_chars: int = MAX_CHARS) -> str:
    """Returns an answer as a judge is shown it: without invisible characters, neutralized, and capped.

    A second call changes nothing more. An answer of many times `max_chars` is cut first, so that nobody can make the
    gateway process megabytes.
    """
    return _shown(capped(text, 16 * max_chars), max_chars)


@functools.lru_cache(maxsize=64)  # a candidate is shown once for every verdict that it takes part in
def _shown(text: str, max_chars: int) -> str:
    return capped(neutral(visible(text)), max_chars)


def new_nonce(*texts: str, draw: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """Returns a fresh fence nonce (4 hex digits) that occurs in none of `texts`.

    The texts are written before the nonce is drawn, so their authors cannot guess it, and it may be short. It becomes
    longer only for a text that consists almost only of nonces: 64 KiB can hold every nonce of 4 digits.

    Args:
        texts: Everything that will be between the fences, before or after `shown`.
        draw: Returns the requested number of random bytes; training passes a seeded function.
    """
    nonces = (draw(2 + tries // 64).hex() for tries in itertools.count())
    # Removing invisible characters can join the parts of a nonce.
    written = {variant for text in texts for variant in (text, visible(text))}
    return next(nonce for nonce in nonces if not any(nonce in text for text in written))


def comparison(
    question: str, first: str, second: str, *, nonce: str, max_chars: int = MAX_CHARS
) -> list[dict[str, str]]:
    """Writes one comparison as chat messages; the judge's next token is its verdict.

    Args:
        question: The question; it is shown in full, with its special tokens neutralized.
        first: The answer shown as A; see `shown`.
        second: The answer shown as B.
        nonce: From `new_nonce(question, first, second)`; must occur in neither answer.
        max_chars: The most characters of each answer to show; lower for a judge with a short context.

    Raises:
        ValueError: An answer contains the nonce, so it could close its fence.
    """
    question, first, second = neutral(question, speakers=False), shown(first, max_chars), shown(second, max_chars)
    if nonce in first or nonce in second:
        raise ValueError("an answer contains the fence nonce")
    content = TEMPLATE.format(question=question, first=first, second=second, nonce=nonce)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def read_verdict(logprobs: Mapping[str, float]) -> float | None:
    """Reads a verdict from the log-probabilities of the judge's first token.

    Args:
        logprobs: Token text → log-probability in nats, typically of the top 20 tokens. The probabilities of tokens that
            differ from a verdict only in white space around it are added.

    Returns:
        P(A) / (P(A) + P(B)), in [0, 1]; None if neither verdict is among the tokens (a parse failure).
    """
    mass = dict.fromkeys(VERDICTS, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in mass:
            # No log-probability is above 0; an endpoint that sends one must not overflow the exponential.
            mass[token.strip()] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass[VERDICTS[0]] / total if total > 0 else None


def explained(comparison: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns the comparison with the request to write a rationale before the verdict."""
    return [*comparison[:-1], {**comparison[-1], "content": f"{comparison[-1]['content']}\n{EXPLAIN}"}]


def read_explained(text: str) -> str | None:
    """Returns the verdict, A or B, at the end of a rationale; None if its last line names none."""
    verdict = _VERDICT_LINE.search(text)
    return verdict[1] if verdict else None


class Outcome(NamedTuple):
    """The result of both orders of one pair.

    Attributes:
        winner: "first", "second", or "tie" if the orders disagree, a verdict could not be read, or the score is within
            the calibration's margin of ½.
        score: The probability that the first answer is better, averaged over the orders that could be read; ½ if none
            could.
        consistent: Whether both orders were read and name the same answer.
        parse_failures: The number of verdicts, of the two, that could not be read.
    """

    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int


def probability(log_odds: float) -> float:
    """Returns the probability with these log-odds."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def combine(forward: float | None, backward: float | None, calibration: Calibration | None = None) -> Outcome:
    """Combines the two orders of one pair.

    Args:
        forward: P(A) with the first answer shown as A; None if it could not be read.
        backward: P(A) with the *second* answer shown as A; None if it could not be read.
        calibration: The judge's calibration. The temperature applies to the log-odds of each order, the margin to the
            mean probability. It cannot reverse a verdict, but it can make a verdict a tie.
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
    if temperature == 1.0 or view in {0.0, 1.0}:  # 0 and 1 do not change at any temperature
        return view
    return probability((math.log(view) - math.log1p(-view)) / temperature)
