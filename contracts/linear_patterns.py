r"""Regular expressions from configs and requests: searched by RE2 in time that grows with the text, never faster.

Python's engine tries every way in which a pattern can match. On the wrong text `[\w.]+@[\w.]+` takes minutes and
`(a+)+b` for ever, while nothing else runs. RE2 has no look-around and no back-references: `compiled` refuses them.

`\w`, `\d`, `\s` stand for the characters of all languages, as they do for Python. RE2's own are those of ASCII.
"""

import re
import time

import re2

# Where a class is: by itself, and between brackets. RE2 has no complement of a union between brackets: there a
# capital letter keeps its ASCII meaning, which matches more.
_UNICODE = {
    "w": (r"[\p{L}\p{M}\p{N}_]", r"\p{L}\p{M}\p{N}_"),
    "d": (r"\p{Nd}", r"\p{Nd}"),
    "s": (r"[\s\x{1c}-\x{1f}\x{85}\p{Z}\v]", r"\s\x{1c}-\x{1f}\x{85}\p{Z}\v"),
    "W": (r"[^\p{L}\p{M}\p{N}_]", r"\W"),
    "D": (r"\P{Nd}", r"\D"),
    "S": (r"[^\s\x{1c}-\x{1f}\x{85}\p{Z}\v]", r"\S"),
    "Z": (r"\z", r"\Z"),
}
_PART = re.compile(r"\\.|\[\^?\]?|\]|[^\\\[\]]+", re.DOTALL)


class SlowError(Exception):
    """A text has so many matches that replacing them would take longer than is allowed."""


class Pattern:
    """A compiled pattern.

    Args:
        pattern: In Python's syntax, without look-around and back-references.

    Raises:
        ValueError: RE2 cannot read it; the message says why.
    """

    def __init__(self, pattern: str) -> None:
        options = re2.Options()
        options.log_errors = False
        try:
            self._compiled = re2.compile(_with_unicode(pattern).encode(), options)
        except re2.error as error:
            (reason,) = error.args or ("",)
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise ValueError(
                f"{pattern!r} is not a regular expression that takes linear time: {reason}; look-around, "
                "back-references and possessive quantifiers are not possible"
            ) from None

    def found_in(self, text: str) -> bool:
        """Whether the pattern matches anywhere in a text."""
        return self._compiled.search(text.encode(errors="replace")) is not None

    def replaced(self, text: str, by: str, *, until: float = float("inf")) -> str:
        """Returns the text with every match replaced that is not empty.

        Args:
            text: The text.
            by: What stands in the place of each match.
            until: The time of `time.monotonic` at which to give up.

        Raises:
            SlowError: That time has come: a single search is linear, but each match begins another one.
        """
        whole, stand_in = text.encode(errors="surrogatepass"), by.encode()
        parts: list[bytes] = []
        end = 0
        for match in self._compiled.finditer(whole):
            if match.end() > match.start():
                parts += (whole[end : match.start()], stand_in)
                end = match.end()
            if time.monotonic() > until:
                raise SlowError
        return text if not parts else b"".join([*parts, whole[end:]]).decode(errors="surrogatepass")


def _with_unicode(pattern: str) -> str:
    """Returns the pattern for RE2, with classes that hold the characters of all languages."""
    parts: list[str] = []
    inside = False
    for part in _PART.findall(pattern):
        if part[0] == "\\":
            parts.append(_UNICODE.get(part[1], (part, part))[inside])
        elif part == "]":
            inside = False
            parts.append(part)
        elif part[0] == "[" and inside:
            parts.append(f"\\[{part[1:]}")
            inside = not part.endswith("]")
        else:
            inside = inside or part[0] == "["
            parts.append(part)
    return "".join(parts)
