"""`/v1/completions` and `/v1/embeddings`: passed to one model as they are, within its limits and the key's budget."""

from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import Send

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import SINGLE_MODEL_MODE
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.answering.request import FusionRequest, Plan
from mixfuse.fusion.calls.upstream import Purpose
from mixfuse.fusion.config import FusionConfig, Member
from mixfuse.fusion.http import chat
from mixfuse.fusion.http.chat_completion import failure
from mixfuse.fusion.http.completion import EventStream
from mixfuse.fusion.http.fields import Fields
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.modes.registry import Answer

Api = Literal["completions", "embeddings"]

_INPUT = {"completions": "prompt", "embeddings": "input"}
# A prompt of token ids is estimated as text that counts at least one token each.
_ONE_TOKEN = "é"  # noqa: S105 - two bytes of text


@dataclass
class PassedWire:
    """Sends the model's own response, under the name by which the client asked.

    Attributes:
        body: The request's body.
        response: The model's response, once there is one.
    """

    body: dict[str, Any]
    response: dict[str, Any] | None = None

    def whole(self, _request: FusionRequest, _trace: Trace, _answer: str) -> dict[str, Any]:
        """Returns the model's response."""
        return {**(self.response or {}), "model": self.body["model"]}

    def stream(self, _send: Send, _request: FusionRequest) -> EventStream | None:
        """Returns None: these are not streamed."""
        return None

    def failure(self, error: MixfuseError, trace: Trace | None) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        return failure(error, trace)


def plan(api: Api, body: object, config: FusionConfig, role_names: list[str]) -> tuple[dict[str, Any], Plan]:
    """Returns the request's body and its plan.

    Raises:
        RequestError: It names no model that is known, it holds no input, or it asks for a stream or for too much.
    """
    fields = Fields(body)
    name, key = fields.need("model", str), _INPUT[api]
    inputs = _inputs(fields, key)
    fields.only("stream", False)
    answers = 0
    if api == "completions":
        each = fields.take("n", int) or 1
        best_of = fields.take("best_of", int) or 1
        answers = max(each, best_of) * len(inputs)
    if max(answers, len(inputs)) > config.caps.calls:
        raise RequestError(
            f"{max(answers, len(inputs))} texts are asked for; at most {config.caps.calls} are allowed (caps.calls)",
            code="invalid_value",
            param=key,
        )
    limit = fields.take("max_tokens", int)
    if limit is not None and limit < 0:
        raise fields.wrong("max_tokens", "must not be negative")
    parameters: dict[str, Any] = {"n": answers} if answers else {}
    if limit is not None:
        parameters["max_tokens"] = limit
    assert isinstance(body, dict)  # noqa: S101 - `Fields` has checked it
    member = _model(api, name, config, role_names)
    messages = tuple({"role": "user", "content": text} for text in inputs)
    return body, Plan(name, SINGLE_MODEL_MODE, messages, parameters, (member,), config.modes)


def forward(api: Api, wire: PassedWire) -> Answer:
    """Returns what answers such a request."""

    async def answer(request: FusionRequest) -> str:
        (member,) = request.plan.members
        wire.response = await request.pool.forward(
            member,
            wire.body,
            path=f"/{api}",
            inputs=request.plan.messages,
            parameters=request.plan.parameters,
            purpose=Purpose.of(member, "answer", member.name),
            ledger=request.ledger,
        )
        request.reason = SINGLE_MODEL_MODE
        choices = wire.response.get("choices")
        texts = [choice.get("text") for choice in choices or () if isinstance(choice, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))

    return answer


def _model(api: Api, name: str, config: FusionConfig, role_names: list[str]) -> Member:
    for model in config.embeddings:
        if model.name == name:
            if api == "embeddings":
                return model
            raise RequestError(
                f"{name!r} writes no text: it is one of 'embeddings'", code="model_not_found", status=404
            )
    return chat.by_name(name, config, role_names)


def _inputs(fields: Fields, key: str) -> list[str]:
    """Returns the texts of a request, for estimates and the trace."""
    value = fields.take(key)
    many = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    texts = []
    for one in many:
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, list) and one and all(type(token) is int and token >= 0 for token in one):
            texts.append(_ONE_TOKEN * len(one))
        else:
            raise fields.wrong(key, "must be a text, a list of texts, or token ids")
    return texts
