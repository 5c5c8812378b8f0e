"""When candidates say the same: equal as text, in the number they come to, as JSON, or in the option they choose."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from mixfuse.fusion.modes.request import Candidate

How = Literal["never", "exact", "number", "json", "choice"]

_NUMBER = re.compile(r"[-\u2212]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-\u2212]?\.\d+")
_FENCE = re.compile(r"^\s*```\w*\n(.*)\n```\s*$", re.DOTALL)
# "The answer is (B)", "Option: C"; the last one counts, as the last number does.
_NAMED_CHOICE = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*[:=]?\s*[*_(\[]*([A-Z])\b(?!')", re.IGNORECASE)
# "The answer is \\(\\boxed{\\text{G}}\\)"
_BOXED_CHOICE = re.compile(r"\\boxed\{[\s{(]*(?:\\(?:text|mathrm|mathbf|textbf)\{[\s(]*)?([A-Z])\b")
_BARE_CHOICE = re.compile(r"^\W*([A-Z])(?:\W*$|[).:\]*])")
_WORD_CHOICE = re.compile(r"^\W*(yes|no|true|false)\b", re.IGNORECASE)


def distinct(candidates: Sequence[Candidate], how: How) -> list[Candidate]:
    """The candidates without those that say the same as an earlier one.

    Args:
        candidates: In candidate order.
        how: What counts as the same; with `never` all are kept.
    """
    if how == "never":
        return list(candidates)
    first_of: dict[str, Candidate] = {}
    for candidate in candidates:
        first_of.setdefault(key(candidate, how), candidate)
    return list(first_of.values())


def key(candidate: Candidate, how: How) -> str:
    """What a candidate says, such that two that say the same have equal keys.

    Calls of tools count as the calls they are, whatever their order of keys and their white space. An answer without
    a number, JSON or choice in it falls back to its text.
    """
    if candidate.tool_calls:
        return "calls " + " ".join(described(call) for call in candidate.tool_calls)
    return said(candidate.text, how)


def said(text: str, how: How) -> str:
    """What a text says, such that two that say the same give equal strings; see `key`."""
    read = {"number": _number, "json": _json, "choice": _choice}.get(how)
    found = read(text) if read else None
    return f"text {' '.join(text.split())}" if found is None else f"{how} {found}"


def readings(text: str, how: How) -> list[str]:
    """Everything that a text may be read to say, in its order; the last is what `said` takes. Empty: nothing was read."""
    if how == "choice":
        return [f"choice {choice}" for choice in _choices(text)]
    if how in ("number", "json"):
        key = said(text, how)
        return [key] if key.startswith(f"{how} ") else []
    return [said(text, how)] if text.strip() else []


def described(call: dict[str, Any]) -> str:
    """A call of a tool as text: its name and its arguments in a settled order."""
    function = call["function"]
    arguments = _json(function["arguments"])
    return f"{function['name']}({function['arguments'] if arguments is None else arguments})"


def _number(text: str) -> str | None:
    """The last number, as a plain decimal: `1,000.0` is `1000`."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    if abs(number.adjusted()) > 100:  # written out it would be all zeros
        return str(number.normalize())
    return format(number.normalize() + 0, "f")


def _json(text: str) -> str | None:
    """The JSON value the text is, written in one settled way; a Markdown code fence around it is taken off."""
    fence = _FENCE.match(text)
    try:
        return json.dumps(json.loads(fence[1] if fence else text), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _choice(text: str) -> str | None:
    """The letter, or yes, no, true or false."""
    choices = _choices(text)
    return choices[-1] if choices else None


def _choices(text: str) -> list[str]:
    """Every option that the text names as its answer, in order."""
    if named := _NAMED_CHOICE.findall(text):
        return [str(choice).upper() for choice in named]
    if boxed := _BOXED_CHOICE.findall(text):
        return [str(choice) for choice in boxed]
    if bare := _BARE_CHOICE.match(text):
        return [bare[1]]
    word = _WORD_CHOICE.match(text)
    return [word[1].lower()] if word else []
