"""A chat completion request: read strictly, and settled against the config into a plan.

What the gateway does not support is refused by name, never silently dropped.
"""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusion.config import FUSION_PREFIX, FusionConfig, Member
from fusion.run import Mode, Plan
from fusion.upstream import Message
from mixfuse import recipe
from mixfuse.errors import MixfuseError
from mixfuse.recipe import Strict

MODELS: dict[str, Mode] = {
    f"{FUSION_PREFIX}best-of": "best_of",
    f"{FUSION_PREFIX}merge": "merge",
    f"{FUSION_PREFIX}debate": "debate",
}
"""The modes, by the model name a client asks for."""

_SAMPLING = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop")
_LOGPROBS = ("logprobs", "top_logprobs")

# Parameters of OpenAI's API that we do not support, with the values at which they change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "verbosity": (),
    "web_search_options": (),
}
# About the request, not about the answer.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class RequestError(MixfuseError):
    """A request the gateway refuses, in the terms of OpenAI's error object."""

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message, kind="invalid_request_error")
        self.code, self.param, self.status = code, param, status


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class FusionOptions(Strict):
    """What a request may set for itself, in its `fusion` object.

    Attributes:
        mode: Instead of the one the model name says.
        members: Who answers, by name.
        samples: How many answers each member gives.
        max_rounds: How often a debate's members may revise.
    """

    mode: Literal["best_of", "merge", "debate"] | None = None
    members: tuple[str, ...] | None = Field(default=None, min_length=1)
    samples: int | None = Field(default=None, ge=1, le=64)
    max_rounds: int | None = Field(default=None, ge=1, le=10)


class TextPart(Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message; images, audio and tool calls are not supported."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = None

    def plain(self) -> Message:
        """As it is sent on: content as one string, `developer` by its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(BaseModel):
    """The request body, as far as the gateway supports it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    fusion: FusionOptions | None = None


def parse(body: object) -> ChatRequest:
    """Reads a request body.

    Raises:
        RequestError: It is no object, lacks something, or asks for something unsupported.
    """
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object", code="invalid_json")
    fields = {key: value for key, value in body.items() if value is not None and key not in _IGNORED}
    for key, neutral in _UNSUPPORTED.items():
        if key in fields and fields.pop(key) not in neutral:
            raise RequestError(f"{key!r} is not supported here", code="unsupported_parameter", param=key)
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        location = ".".join(str(part) for part in error.errors()[0]["loc"])
        code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(
            error.errors()[0]["type"], "invalid_value"
        )
        raise RequestError(recipe.describe(error, ChatRequest), code=code, param=location) from None


def plan(request: ChatRequest, config: FusionConfig, role_names: list[str]) -> Plan:
    """Settles what a request asks for: a mode over the pool, or one model passed through.

    Args:
        request: The parsed request.
        config: The gateway's config.
        role_names: Roles that may be asked for by name.

    Raises:
        RequestError: The model, a member or the combination of parameters is not to be had.
    """
    messages = tuple(message.plain() for message in request.messages)
    sampling = request.model_dump(include=set(_SAMPLING), exclude_none=True)
    logprobs = request.model_dump(include=set(_LOGPROBS), exclude_none=True)
    if request.model in MODELS:
        if request.logprobs:
            raise RequestError(
                "'logprobs' are not to be had of a fused answer",
                code="unsupported_parameter",
                param="logprobs",
            )
        return _fused(request, config, messages, sampling)
    model = _by_name(request.model, config, role_names)
    if request.fusion is not None:
        raise RequestError(
            f"'fusion' options go with a {FUSION_PREFIX}… model, not with {request.model!r}",
            code="unsupported_parameter",
            param="fusion",
        )
    if request.stream and request.logprobs:
        raise RequestError("'logprobs' are not streamed", code="unsupported_parameter", param="logprobs")
    return Plan(request.model, "pass_through", messages, {**sampling, **logprobs}, (model,))


def _fused(request: ChatRequest, config: FusionConfig, messages: tuple[Message, ...], sampling: dict[str, Any]) -> Plan:
    options = request.fusion or FusionOptions()
    mode = options.mode or MODELS[request.model]
    settings = config.modes
    if options.max_rounds is not None:
        settings = settings.model_copy(update={"max_rounds": options.max_rounds})
    members = config.members if options.members is None else _chosen(options.members, config)
    if options.samples is not None:
        members = tuple(member.model_copy(update={"samples": options.samples}) for member in members)
    candidates = sum(member.samples for member in members)
    if candidates < settings.min_responses:
        raise RequestError(
            f"{candidates} answers were asked for, but this gateway needs {settings.min_responses}",
            code="invalid_value",
            param="fusion",
        )
    ending = settings.debate_ending if mode == "debate" else mode
    decider, having = {"best_of": ("judge", config.judge), "merge": ("synthesizer", config.synthesizer)}[ending]
    if having is None:
        raise RequestError(f"mode {mode!r} needs a {decider}; none is configured", code="mode_unavailable")
    return Plan(request.model, mode, messages, sampling, members, settings, config.judge, config.synthesizer)


def _chosen(names: tuple[str, ...], config: FusionConfig) -> tuple[Member, ...]:
    """The members of those names, in the config's order."""
    known = [member.name for member in config.members]
    for name in names:
        if name not in known:
            message = f"there is no member {name!r}; {_near(name, known)}"
            raise RequestError(message, code="unknown_member", param="fusion.members")
    return tuple(member for member in config.members if member.name in names)


def _by_name(name: str, config: FusionConfig, role_names: list[str]) -> Member:
    """A member by its name, with its defaults; or a role by its own, without any."""
    for member in config.members:
        if member.name == name:
            return member.model_copy(update={"samples": 1})
    if name in role_names:
        return Member(name=name, role=name)
    known = [*MODELS, *(member.name for member in config.members), *role_names]
    raise RequestError(
        f"there is no model {name!r}; {_near(name, known)}", code="model_not_found", param="model", status=404
    )


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(dict.fromkeys(known))}"


def _without_nulls(message: object) -> object:
    """Drops a message's null fields: clients send back what `model_dump` gave them."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}
