"""What a mode declares about itself, and the modes by name.

A mode `vote` is the file `vote.py` beside this one: its docstring's first line is its description, and its `MODE` says
how it answers. The gateway, `mixfuse ask`, evaluations, config files and the command line then know it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import FUSED_MODES, MODES
from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.config import Modes

Answer = Callable[[FusionRequest], Awaitable[str]]
"""Answers a request: emits the answer's text where the request is streamed, and returns it."""


@dataclass(frozen=True)
class Mode:
    """How a mode answers, and what it needs.

    Attributes:
        answer: Answers a request.
        needs: What has to be configured: "judge" or "synthesizer"; None if neither.
        takes_tools: An answer may call tools. Otherwise a request with tools is answered by the first member alone, or
            refused (`modes.tools` in the config).
        cites: Its answer can name the candidates that each paragraph drew on (`modes.cite`).
        finish: Makes one answer from the candidates in hand. A mode that has it can end a debate.
        debates: It ends with the `finish` of the mode that `modes.debate_ending` names, and needs what that one needs.
    """

    answer: Answer
    needs: Literal["judge", "synthesizer"] | None = None
    takes_tools: bool = False
    cites: bool = False
    finish: Answer | None = None
    debates: bool = False


@cache
def mode_named(name: str) -> Mode:
    """Returns the mode of that name.

    Raises:
        MixfuseError: There is none.
    """
    if name not in MODES:
        raise MixfuseError(f"there is no mode {name!r}; the modes are {', '.join(FUSED_MODES)}")
    mode: Mode = import_module(f"mixfuse.fusion.modes.{name}").MODE
    return mode


def ending_mode(name: str, settings: Modes) -> Mode:
    """Returns the mode that makes the answer: for a debate the one that ends it, for any other the mode itself."""
    mode = mode_named(name)
    return mode_named(settings.debate_ending) if mode.debates else mode


def check_modes(settings: Modes) -> None:
    """Loads every mode and checks the settings against them.

    Raises:
        MixfuseError: No debate can end with the mode that `debate_ending` names.
    """
    for name in MODES:
        mode_named(name)
    _finish_of(settings.debate_ending)


async def answer(request: FusionRequest) -> str:
    """Answers a request in the mode of its plan.

    Raises:
        MixfuseError: As the mode's `answer`.
    """
    mode = mode_named(request.plan.mode)
    if request.plan.tools and not mode.takes_tools:
        return await request.answer_alone("primary")
    return await mode.answer(request)


async def end_debate(request: FusionRequest) -> str:
    """Makes one answer from a debate's candidates, with the mode that `debate_ending` names.

    Raises:
        MixfuseError: As that mode's `finish`; or it has none.
    """
    return await _finish_of(request.plan.settings.debate_ending)(request)


def _finish_of(name: str) -> Answer:
    finish = mode_named(name).finish
    if finish is None:
        able = [other for other in FUSED_MODES if mode_named(other).finish is not None]
        raise MixfuseError(f"modes.debate_ending: no debate can end with {name!r}; use one of {', '.join(able)}")
    return finish
