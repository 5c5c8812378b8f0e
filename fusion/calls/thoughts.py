"""What a model thought and what it answers, where both come as one text, as a reasoning model without a parser sends.

The marks are those of the chat templates in use. Thoughts stand at the beginning of a text, or later at the beginning
of a line; a mark within a code block is text. Some templates open the thoughts in the prompt, so that only their end
is in the text. Every piece is read once, so that a long text costs no more than its length.
"""

import re
from typing import Literal

# Opening mark → the marks that end it. In lower case: models vary it.
_XML = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think", "mm:think", "longcat_think")
_MARKS: dict[str, tuple[str, ...]] = {
    **{f"<{name}>": (f"</{name}>",) for name in _XML},  # DeepSeek, Qwen, GLM, Seed, MiniMax, LongCat and many more
    "[think]": ("[/think]",),  # Mistral
    "<|begin_of_thought|>": ("<|end_of_thought|>",),  # OpenThinker, Sky-T1
    "<|start_thinking|>": ("<|end_thinking|>",),  # Cohere
    "\u25c1think\u25b7": ("\u25c1/think\u25b7",),  # Kimi-VL
    "<|channel>thought": ("<channel|>",),  # Gemma
    "<|open|>think<|sep|>": ("<|close|>think<|sep|>",),  # Kimi
}
# gpt-oss: channels, of which only the last one is for the reader.
_FINAL = ("<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>")
_MARKS |= {
    f"{start}<|channel|>{channel}<|message|>": ("<|end|>", *_FINAL)
    for start in ("", "<|start|>assistant")
    for channel in ("analysis", "commentary")
}
_ENDS = tuple({end for ends in _MARKS.values() for end in ends} - {"<|end|>", *_FINAL})
# Around the answer, where thoughts came before it.
_AROUND = (*_FINAL, "<|start_response|>", "<|begin_of_solution|>", "<|open|>response<|sep|>")
_AFTER = ("<|return|>", "<|end|>", "<|end_response|>", "<|end_of_solution|>", "<|close|>response<|sep|>")
_LONGEST = max(map(len, (*_MARKS, *_ENDS, *_AROUND, *_AFTER)))
_FIRST = "<[\u25c1"


def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)), re.IGNORECASE)


_OPENING, _ENDING, _INTRODUCING = _any_of(tuple(_MARKS)), _any_of(_ENDS), _any_of(_AROUND)
_TRAILING = re.compile(rf"(?:{_any_of(_AFTER).pattern})\s*\Z", re.IGNORECASE)
_ANY = _any_of((*_MARKS, *_ENDS))
_ENDING_OF = {mark: _any_of(ends) for mark, ends in _MARKS.items()}
_SPACE = re.compile(r"\s*")
_ALL = tuple({*_MARKS, *_ENDS, *_AROUND, *_AFTER, "<|end|>"})

Begins = Literal["auto", "open", "none"]
"""Where a text begins: `auto`: with the answer, unless a mark leads; `open`: in the thoughts; `none`: no thoughts."""


class Splitter:
    """Splits one answer, piece by piece.

    Args:
        begins: Where it begins.

    Attributes:
        opened: Whether thoughts ended that no mark had begun: the template opens them.
    """

    def __init__(self, begins: Begins = "auto") -> None:
        self.opened = False
        self._said: list[str] = []
        self._thought: list[str] = []
        self._off = begins == "none"
        self._held = ""
        self._ends: re.Pattern[str] | None = _ENDING if begins == "open" else None
        self._presumed = begins == "open"  # inside thoughts that no mark began
        self._leading = True
        self._split = False  # whether a mark was found
        self._fences, self._ticks, self._line = 0, "", ""

    @property
    def said(self) -> str:
        """The answer so far."""
        return "".join(self._said)

    @property
    def thought(self) -> str:
        """The thoughts so far."""
        return "".join(self._thought)

    @property
    def found(self) -> bool:
        """Whether a mark was found, even if there are no thoughts behind it."""
        return self._split

    def feed(self, piece: str) -> tuple[str, str]:
        """Takes the next piece; returns the (answer, thoughts) that are certain now and were not before."""
        if self._off:
            self._said.append(piece)
            return piece, ""
        if not self._leading and self._ends is None and not self._held and not any(sign in piece for sign in _FIRST):
            self._say(piece)
            return piece, ""
        return self._read(self._held + piece, last=False)

    def end(self, *, cut: bool) -> tuple[str, str]:
        """Ends the answer; returns the (answer, thoughts) that were still open.

        Args:
            cut: Whether the model was stopped before it was done. Thoughts that were only presumed, since other
                answers of the model began in them, are then thoughts; otherwise they were the answer.
        """
        held, self._held = self._held, ""
        if self._presumed and self._ends is not None and not cut:
            answer = self.thought + held
            self._thought, self._ends = [], None
            self._say(answer)
            return answer, ""
        held = _TRAILING.sub("", held) if self._split and self._ends is None else held
        said, thought = self._read(held, last=True) if held else ("", "")
        if self._split:
            self._said = [_TRAILING.sub("", self.said)]
        return said, thought

    def _read(self, text: str, *, last: bool) -> tuple[str, str]:
        said: list[str] = []
        thought: list[str] = []
        position = 0
        while position < len(text):
            if self._ends is not None:
                position, waits = self._read_thought(text, position, thought, last=last)
            elif self._leading:
                position, waits = self._read_lead(text, position, last=last)
            else:
                position, waits = self._read_answer(text, position, said, thought, last=last)
            if waits:
                break
        self._held = text[position:]
        return "".join(said), "".join(thought)

    def _read_thought(self, text: str, position: int, thought: list[str], *, last: bool) -> tuple[int, bool]:
        assert self._ends is not None  # noqa: S101 - for the types
        if self._presumed and not self._thought and (mark := _OPENING.match(text, _SPACE.match(text, position).end())):  # type: ignore[union-attr]
            self._presumed, self._ends = False, _ENDING_OF[mark[0].lower()]
            return mark.end(), False
        found = self._ends.search(text, position)
        until = found.start() if found else len(text) if last else _certain(text, position)
        piece = text[position:until]
        self._thought.append(piece)
        thought.append(piece)
        if found is None:
            return until, True
        if self._presumed:
            self.opened = True
        self._ends, self._presumed, self._leading, self._split = None, False, True, True
        # The final channel is both an end and a beginning: what comes next is the answer.
        return found.end(), False

    def _read_lead(self, text: str, position: int, *, last: bool) -> tuple[int, bool]:
        start = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if mark := _OPENING.match(text, start):
            self._ends, self._split = _ENDING_OF[mark[0].lower()], True
            return mark.end(), False
        if mark := _INTRODUCING.match(text, start):
            self._split = True
            return mark.end(), False
        rest = text[start : start + _LONGEST].lower()
        if not last and start - position < _LONGEST and any(mark.startswith(rest) for mark in _ALL):
            return position, True
        self._leading = False
        return start if self._split else position, False

    def _read_answer(
        self, text: str, position: int, said: list[str], thought: list[str], *, last: bool
    ) -> tuple[int, bool]:
        for mark in _ANY.finditer(text, position):
            before = text[position : mark.start()]
            opens = mark[0].lower() in _MARKS
            if self._speaks_for_itself(before) and (not self._line_of(before).strip() if opens else not self._split):
                said.append(before)
                self._say(before)
                if opens:
                    self._ends, self._split = _ENDING_OF[mark[0].lower()], True
                else:  # an end without a beginning: all before it was thought
                    thought.append(self.said)
                    self._thought.append(self.said)
                    said.clear()
                    self._said, self._fences, self._ticks, self._line = [], 0, "", ""
                    self.opened = self._split = self._leading = True
                return mark.end(), False
            passed = text[position : mark.end()]
            said.append(passed)
            self._say(passed)
            position = mark.end()
        until = len(text) if last else _certain(text, position)
        said.append(text[position:until])
        self._say(text[position:until])
        return until, True

    def _speaks_for_itself(self, before: str) -> bool:
        """Whether a mark after this text is outside of code blocks and quotation marks."""
        line = self._line_of(before)
        fences = self._fences + (self._ticks + before).count("```")
        return fences % 2 == 0 and line.count("`") % 2 == 0 and not line.endswith(('"', "'"))

    def _line_of(self, before: str) -> str:
        """Returns the end of the line that this text ends in."""
        return (self._line + before)[-200:].rpartition("\n")[2]

    def _say(self, text: str) -> None:
        self._said.append(text)
        ticks = self._ticks + text
        self._fences += ticks.count("```")
        self._ticks = "`" * ((len(ticks) - len(ticks.rstrip("`"))) % 3)
        self._line = (self._line + text)[-200:]


def _certain(text: str, position: int) -> int:
    """Returns the place up to which no later text can make a mark of it."""
    start = max(position, len(text) - _LONGEST)
    tail = text[start:].lower()
    for place, character in enumerate(tail):
        if character in _FIRST and any(mark.startswith(tail[place:]) for mark in _ALL):
            return start + place
    return len(text)


def split(text: str, *, begins: Begins = "auto", cut: bool = False) -> Splitter:
    """Splits a complete answer."""
    splitter = Splitter(begins)
    splitter.feed(text)
    splitter.end(cut=cut)
    return splitter
