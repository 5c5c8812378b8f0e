"""Citations: marks in a synthesis that name the candidates a paragraph drew on; removed while it is streamed."""

import re
from collections.abc import Sequence

from mixfuse.contracts.trace import Citation
from mixfuse.fusion.calls.upstream import Emit

INSTRUCTION = (
    "End each paragraph with the numbers of the answers it draws on, like this: [from 1, 3]. "
    "Write [from 0] where it draws on none."
)

# Possessive quantifiers, and no beginning amid spaces: otherwise these take for ever on the wrong digits or spaces.
_MARK = re.compile(r"(?<![ \t])[ \t]*+\[from ((?:\d++(?:,| and)?+[ ]?+)++)\]")
# Text that may become a mark when more text arrives.
_PARTIAL_MARK = re.compile(
    r"(?<![ \t])[ \t]*+(?:\[(?:f(?:r(?:o(?:m(?: (?:\d++(?:,| and?| an| a)?+[ ]?+)*+)?)?)?)?)?)?$"
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


class Citations:
    """Takes text piece by piece, emits it without the marks, and collects the citations.

    Args:
        shown: The indices of the candidates, in the order in which the synthesizer saw them: its 1 is the first.
        emit: Takes the text without marks; None: it is only collected.

    Attributes:
        text: The text so far, without marks.
    """

    def __init__(self, shown: Sequence[int], emit: Emit | None) -> None:
        self._shown, self._emit = shown, emit
        self._waiting = ""
        self._marked: list[tuple[int, list[int]]] = []
        self.text = ""

    async def feed(self, piece: str) -> None:
        """Takes the next piece."""
        self._waiting += piece
        while mark := _MARK.search(self._waiting):
            await self._pass_on(self._waiting[: mark.start()])
            self._marked.append((len(self.text), [int(number) for number in re.findall(r"\d+", mark[1])]))
            self._waiting = self._waiting[mark.end() :]
        partial = _PARTIAL_MARK.search(self._waiting)
        ready = partial.start() if partial else len(self._waiting)
        await self._pass_on(self._waiting[:ready])
        self._waiting = self._waiting[ready:]

    async def end(self) -> list[Citation]:
        """Emits the rest; returns the citations of each paragraph, with an empty list for one without marks."""
        await self._pass_on(self._waiting)
        self._waiting = ""
        ends = [separator.end() for separator in _PARAGRAPH.finditer(self.text)]
        cited: list[list[int]] = [[] for _ in range(len(ends) + 1)]
        for place, numbers in self._marked:
            # A mark at the start of a paragraph belongs to the paragraph before: it stood on a line of its own.
            paragraph = sum(end <= place for end in ends)
            if paragraph and not self.text[ends[paragraph - 1] : place].strip():
                paragraph -= 1
            cited[paragraph] += [self._shown[number - 1] for number in numbers if 1 <= number <= len(self._shown)]
        return [Citation(paragraph=number, candidates=sorted(set(indices))) for number, indices in enumerate(cited)]

    async def _pass_on(self, text: str) -> None:
        self.text += text
        if text and self._emit is not None:
            await self._emit(text)
