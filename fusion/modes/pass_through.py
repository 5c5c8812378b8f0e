"""pass_through: one model, asked for by its own name, answers alone."""

from mixfuse.fusion.answering.request import FusionRequest
from mixfuse.fusion.modes.registry import Mode


async def pass_through(request: FusionRequest) -> str:
    """Answers with the model's own completion.

    Raises:
        CallError: The model gave no usable answer.
    """
    return await request.answer_alone("pass_through")


MODE = Mode(answer=pass_through, takes_tools=True)
