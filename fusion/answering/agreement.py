"""When candidates agree: equal as text, in their last number, as JSON, or in the option they choose."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from mixfuse.fusion.answering.candidate import Candidate
from mixfuse.fusion.config import Agreement

_NUMBER = re.compile(r"[-\u2212]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-\u2212]?\.\d+")
_FENCE = re.compile(r"^\s*```\w*\n(.*)\n```\s*$", re.DOTALL)
# "The answer is (B)", "Option: C"; the last one counts, as the last number does.
_NAMED_CHOICE = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s++is)?\s*+(?:[:=]\s*+)?[*_(\[]*+([A-Z])\b(?!')", re.IGNORECASE
)
# "The answer is \\(\\boxed{\\text{G}}\\)"
_BOXED_CHOICE = re.compile(r"\\boxed\{[\s{(]*(?:\\(?:text|mathrm|mathbf|textbf)\{[\s(]*)?([A-Z])\b")
_BARE_CHOICE = re.compile(r"^\W*([A-Z])(?:\W*$|[).:\]*])")
_WORD_CHOICE = re.compile(r"^\W*(yes|no|true|false)\b", re.IGNORECASE)


def distinct(candidates: Sequence[Candidate], rule: Agreement) -> list[Candidate]:
    """Returns the candidates without those that agree with an earlier one.

    Args:
        candidates: In candidate order.
        rule: When two agree; with `never` all are kept.
    """
    if rule == "never":
        return list(candidates)
    first_of: dict[str, Candidate] = {}
    for candidate in candidates:
        first_of.setdefault(candidate_key(candidate, rule), candidate)
    return list(first_of.values())


FIRST = 0.5
"""What the first answer in the config's order counts beyond its votes, so that the judge alone settles no even vote.

Without it a judge of .55 to .66 pair accuracy loses to a majority vote whose ties go by that order. With it none
does, in any pool of benchmarks/best_of_votes.py.
"""


def votes(candidates: Sequence[Candidate], rule: Agreement) -> dict[int, float]:
    """Returns the votes for each distinct answer, by the index of the first candidate that gives it.

    Where texts are compared and no two are equal, nobody has voted: all get one vote, the first too.
    """
    first_of: dict[str, int] = {}
    counts: dict[int, float] = {}
    for candidate in candidates:
        key = str(candidate.index) if rule == "never" else candidate_key(candidate, rule)
        first = first_of.setdefault(key, candidate.index)
        counts[first] = counts.get(first, 0.0) + 1.0
    if rule not in ("never", "exact") or len(counts) < len(candidates):
        counts[candidates[0].index] += FIRST
    return counts


def candidate_key(candidate: Candidate, rule: Agreement) -> str:
    """Returns a key that is equal for two candidates exactly if they agree.

    Tool calls are compared by function and arguments; the arguments' key order and white space do not matter.
    """
    if candidate.tool_calls:
        return "calls " + " ".join(tool_call_text(call) for call in candidate.tool_calls)
    return text_key(candidate.text, rule)


def text_key(text: str, rule: Agreement) -> str:
    """Returns a key that is equal for two texts exactly if they agree.

    A text without a number, JSON or choice in it is compared as text, white space aside.
    """
    read = {"number": _last_number, "json": _normalized_json, "choice": _choice}.get(rule)
    value = read(text) if read else None
    return f"text {' '.join(text.split())}" if value is None else f"{rule} {value}"


def readings(text: str, rule: Agreement) -> list[str]:
    """Returns everything that a text can be read to say, in its order; `text_key` takes the last one.

    Returns:
        Keys as `text_key` returns them; none where nothing but the text itself could be compared.
    """
    if rule == "choice":
        return [f"choice {choice}" for choice in _choices(text)]
    if rule in ("number", "json"):
        key = text_key(text, rule)
        return [key] if key.startswith(f"{rule} ") else []
    return [text_key(text, rule)] if text.strip() else []


def tool_call_text(call: dict[str, Any]) -> str:
    """Returns a tool call as text: the function's name, and its arguments with their keys sorted."""
    function = call["function"]
    arguments = _normalized_json(function["arguments"])
    return f"{function['name']}({function['arguments'] if arguments is None else arguments})"


def _last_number(text: str) -> str | None:
    """Returns the last number as a plain decimal: `1,000.0` is `1000`."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    text = numbers[-1].replace(",", "").replace("\u2212", "-")
    try:
        number = Decimal(text).normalize()
    except ArithmeticError:  # an exponent of a million and more, say
        return text.lower()
    if abs(number.adjusted()) > 100:  # as a plain decimal it would be mostly zeros
        return str(number)
    return format(number + 0, "f")


def _normalized_json(text: str) -> str | None:
    """Returns the text's JSON value with sorted keys; a Markdown code fence around it is removed first."""
    fence = _FENCE.match(text)
    try:
        return json.dumps(json.loads(fence[1] if fence else text), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _choice(text: str) -> str | None:
    """Returns the option's letter, or yes, no, true or false."""
    choices = _choices(text)
    return choices[-1] if choices else None


def _choices(text: str) -> list[str]:
    """Returns every option that the text names as its answer, in order."""
    if named := _NAMED_CHOICE.findall(text):
        return [str(choice).upper() for choice in named]
    if boxed := _BOXED_CHOICE.findall(text):
        return [str(choice) for choice in boxed]
    if bare := _BARE_CHOICE.match(text):
        return [bare[1]]
    word = _WORD_CHOICE.match(text)
    return [word[1].lower()] if word else []
