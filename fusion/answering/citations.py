"""Citations: marks in a synthesis that say which candidates a paragraph drew on, taken out while it is streamed."""

import re
from collections.abc import Sequence

from mixfuse.contracts.trace import Citation
from mixfuse.fusion.calls.upstream import Emit

INSTRUCTION = (
    "End each paragraph with the numbers of the answers it draws on, like this: [from 1, 3]. "
    "Write [from 0] where it draws on none."
)

_MARK = re.compile(r"[ \t]*\[from ((?:\d+(?:,| and)?[ ]?)+)\]")
# What may become a mark once more text has come.
_BEGUN = re.compile(r"[ \t]*(?:\[(?:f(?:r(?:o(?:m(?: (?:\d+(?:,| and?| an| a)?[ ]?)*)?)?)?)?)?)?$")
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


class Citations:
    """Takes text as it comes, hands it on without the marks, and keeps what they say.

    Args:
        shown: The candidates' numbers in the trace, in the order in which the synthesizer saw them: its 1 is the first.
        emit: Where to hand the clean text on; None keeps it here only.
    """

    def __init__(self, shown: Sequence[int], emit: Emit | None) -> None:
        self._shown, self._emit = shown, emit
        self._waiting = ""
        self._marked: list[tuple[int, list[int]]] = []
        self.text = ""

    async def feed(self, piece: str) -> None:
        """Takes the next piece."""
        self._waiting += piece
        while found := _MARK.search(self._waiting):
            await self._pass_on(self._waiting[: found.start()])
            self._marked.append((len(self.text), [int(number) for number in re.findall(r"\d+", found[1])]))
            self._waiting = self._waiting[found.end() :]
        begun = _BEGUN.search(self._waiting)
        ready = begun.start() if begun else len(self._waiting)
        await self._pass_on(self._waiting[:ready])
        self._waiting = self._waiting[ready:]

    async def end(self) -> list[Citation]:
        """Hands on what is left, and says of each paragraph what it drew on; an empty list where no mark said so."""
        await self._pass_on(self._waiting)
        self._waiting = ""
        ends = [found.end() for found in _PARAGRAPH.finditer(self.text)]
        drew: list[list[int]] = [[] for _ in range(len(ends) + 1)]
        for place, numbers in self._marked:
            # A mark at a paragraph's beginning would be one that closes the paragraph before on a line of its own.
            paragraph = sum(end <= place for end in ends)
            if paragraph and not self.text[ends[paragraph - 1] : place].strip():
                paragraph -= 1
            drew[paragraph] += [self._shown[number - 1] for number in numbers if 1 <= number <= len(self._shown)]
        return [Citation(paragraph=number, candidates=sorted(set(of))) for number, of in enumerate(drew)]

    async def _pass_on(self, text: str) -> None:
        self.text += text
        if text and self._emit is not None:
            await self._emit(text)
