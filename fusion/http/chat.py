"""A chat completion request: parsed strictly, and planned against the config.

A parameter that the gateway does not support is refused by name, never dropped silently.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixfuse.contracts import strict_yaml
from mixfuse.contracts.mode_names import FUSED_MODES, MODE_OF_MODEL, MODEL_PREFIX, SINGLE_MODEL_MODE
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.fusion.answering import response_format
from mixfuse.fusion.answering.request import Plan
from mixfuse.fusion.config import FusionConfig, FusionOptions, Member, ModelConfig
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.messages import Message, images
from mixfuse.fusion.modes.registry import ending_mode, mode_named

OPENROUTER = "openrouter/fusion"
"""OpenRouter's name for its Fusion; answered by `merge` if the config allows it."""

_SAMPLING = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "response_format")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_LOGPROBS = ("logprobs", "top_logprobs")

# Parameters of OpenAI's API that are not supported, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
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
# These concern the request, not the answer.
_IGNORED = ("user", "safety_identifier", "prompt_cache_key")
_PARTS = ("text", "image_url")
_LONGEST_MESSAGE = 500
_WITHOUT_TOOLS: tuple[tuple[str, object], ...] = (
    ("tools", []),
    ("tool_choice", "none"),
    ("tool_choice", "auto"),
    ("parallel_tool_calls", True),
    ("parallel_tool_calls", False),
)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class TextPart(Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image's URL, or the image itself as a `data:` URL; the member fetches it, never the gateway."""

    url: str = Field(pattern="^(https?://|data:image/)")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image part of a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Strict):
    """The function that a tool call names, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A tool call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message; audio and files are not supported."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart | ImagePart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    def plain(self) -> Message:
        """Returns the message for the members: content as one string unless it has images, `developer` as `system`."""
        content: Any = self.content
        if isinstance(content, tuple):
            parts = content
            with_images = any(isinstance(part, ImagePart) for part in parts)
            content = (
                [part.model_dump(exclude_none=True) for part in parts]
                if with_images
                else "".join(part.text for part in parts if isinstance(part, TextPart))
            )
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class FunctionTool(Strict):
    """A tool's name, description, and the JSON schema of its arguments."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the answer may call."""

    type: Literal["function"]
    function: FunctionTool


class Plugin(Strict):
    """OpenRouter's plugin `fusion`, as far as the gateway uses it."""

    id: Literal["fusion"]
    enabled: bool = True
    preset: str | None = None
    analysis_models: tuple[str, ...] | None = Field(default=None, min_length=1)
    model: str | None = None


class ChatRequest(BaseModel):
    """The request body, with the supported parameters."""

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
    response_format: dict[str, Any] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Any = None
    fusion: FusionOptions | None = None
    plugins: tuple[Plugin, ...] | None = None

    def sent(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns those of the named parameters that are set, as the members get them."""
        return {
            name: [tool.model_dump(exclude_none=True) for tool in value] if name == "tools" else value
            for name in names
            if (value := getattr(self, name)) is not None
        }


def parse(body: object) -> ChatRequest:
    """Reads a request body.

    Raises:
        RequestError: It is not an object, lacks a parameter, or has an unsupported one.
    """
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object", code="invalid_json")
    fields = {key: value for key, value in body.items() if value is not None and key not in _IGNORED}
    for key, neutral in _UNSUPPORTED.items():
        if key in fields and fields.pop(key) not in neutral:
            raise RequestError(f"{key!r} is not supported here", code="unsupported_parameter", param=key)
    if not fields.get("tools"):  # without tools, these parameters change nothing
        fields = {key: value for key, value in fields.items() if (key, value) not in _WITHOUT_TOOLS}
        if "tool_choice" in fields:
            raise RequestError("'tool_choice' needs 'tools'", code="invalid_value", param="tool_choice")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message, place) for place, message in enumerate(fields["messages"])]
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        location = ".".join(str(part) for part in error.errors()[0]["loc"])
        code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(
            error.errors()[0]["type"], "invalid_value"
        )
        # The message repeats the wrong value, which may be an image of megabytes.
        raise RequestError(
            strict_yaml.describe(error, ChatRequest)[:_LONGEST_MESSAGE], code=code, param=location
        ) from None
    for place, message in enumerate(request.messages):
        _check_shape(message, f"messages.{place}")
    return request


def _without_nulls(message: object, place: int) -> object:
    """Removes a message's null fields, which clients send back from `model_dump`; refuses audio and files."""
    if not isinstance(message, dict):
        return message
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] not in _PARTS:
            raise RequestError(
                f"a content part of type {part['type']!r} is not supported here; text and image_url are",
                code="unsupported_parameter",
                param=f"messages.{place}.content",
            )
    return {key: value for key, value in message.items() if value is not None and (key, value) != ("annotations", [])}


def _check_shape(message: ChatMessage, place: str) -> None:
    """Checks a message's fields against its role."""
    if message.content is None and not message.tool_calls:
        raise RequestError(f"missing key '{place}.content'", code="missing_parameter", param=f"{place}.content")
    if message.role == "tool" and message.tool_call_id is None:
        key = f"{place}.tool_call_id"
        raise RequestError(f"missing key {key!r}", code="missing_parameter", param=key)
    if message.tool_calls and message.role != "assistant":
        key = f"{place}.tool_calls"
        raise RequestError(f"{key!r} goes with the role 'assistant'", code="invalid_value", param=key)


def plan(request: ChatRequest, config: FusionConfig, role_names: list[str]) -> Plan:
    """Plans a request: a mode over the pool, or one model that answers alone.

    Args:
        request: The parsed request.
        config: The gateway's config.
        role_names: The roles that may be asked for by name.

    Raises:
        RequestError: There is no such model or member, or the parameters do not go together.
    """
    messages = tuple(message.plain() for message in request.messages)
    form = _output_format(request)
    options = _options_of_name(request, config)
    if options is None:
        return _plan_single_model(request, _by_name(request.model, config, role_names), config, messages, form)
    if request.logprobs:
        raise _unsupported("logprobs", "a fused answer has no 'logprobs'")
    options = (request.fusion or FusionOptions()).over(options)
    return _FusedPlanner(request, options, config, role_names).plan(messages, form)


def _plan_single_model(
    request: ChatRequest,
    model: Member,
    config: FusionConfig,
    messages: tuple[Message, ...],
    form: response_format.OutputFormat | None,
) -> Plan:
    options = request.fusion or FusionOptions()
    if options.model_fields_set - {"expose"}:
        message = f"'fusion' options other than 'expose' go with a {MODEL_PREFIX}… model or a preset, not with "
        raise _unsupported("fusion", f"{message}{request.model!r}")
    if request.stream and request.logprobs:
        raise _unsupported("logprobs", "'logprobs' are not streamed")
    if images(messages) and not model.images:
        raise _unsupported("messages", f"{request.model!r} takes no images (its config does not say `images: true`)")
    parameters = request.sent((*_SAMPLING, *_TOOLS, *_LOGPROBS))
    settings = options.settings(config.modes)
    return Plan(request.model, SINGLE_MODEL_MODE, messages, parameters, (model,), settings, output=form)


def _options_of_name(request: ChatRequest, config: FusionConfig) -> FusionOptions | None:
    """Returns the options that the model name and the plugins stand for; None if they name no mode or preset."""
    if request.plugins is not None and not config.openrouter_alias:
        raise RequestError(
            "unknown key 'plugins'; OpenRouter's form of requests is off here (openrouter_alias in the config)",
            code="unknown_parameter",
            param="plugins",
        )
    if request.model in MODE_OF_MODEL:
        named = FusionOptions(mode=MODE_OF_MODEL[request.model])
    elif request.model in config.presets:
        named = config.presets[request.model].over(FusionOptions(mode="best_of"))
    elif config.openrouter_alias and request.model == OPENROUTER:
        named = FusionOptions(mode="merge")
    else:
        named = None
    plugin = next((plugin for plugin in request.plugins or () if plugin.enabled), None)
    if plugin is None:
        return named
    # At OpenRouter the requested model writes the answer from the panel's; the plugin's `model` does so if it is set.
    writer = plugin.model or (None if named is not None else request.model)
    below = named or FusionOptions(mode="merge")
    if plugin.preset is not None:
        if plugin.preset not in config.presets:
            message = f"there is no preset {plugin.preset!r}; {_near(plugin.preset, list(config.presets))}"
            raise RequestError(message, code="unknown_preset", param="plugins")
        below = config.presets[plugin.preset].over(below)
    return FusionOptions(members=plugin.analysis_models, judge=plugin.model, synthesizer=writer).over(below)


@dataclass(frozen=True)
class _FusedPlanner:
    """Plans a request for a mode over the pool.

    Attributes:
        request: The parsed request.
        options: Its options, with those of its preset.
        config: The gateway's config.
        role_names: The roles that may be asked for by name.
    """

    request: ChatRequest
    options: FusionOptions
    config: FusionConfig
    role_names: list[str]

    def plan(self, messages: tuple[Message, ...], form: response_format.OutputFormat | None) -> Plan:
        """Returns the plan.

        Raises:
            RequestError: There is no such member, or the parameters do not go together.
        """
        request = self.request
        name = self.options.mode or "best_of"
        settings = self.options.settings(self.config.modes)
        mode, ending = mode_named(name), ending_mode(name, settings)
        if name != "auto":
            for option in ("target", "prefer", "width", "domain"):
                if request.fusion is not None and getattr(request.fusion, option) is not None:
                    raise _unsupported(f"fusion.{option}", f"'fusion.{option}' goes with {MODEL_PREFIX}auto only")
        members, skipped = self._members(with_images=bool(images(messages)))
        candidates = sum(member.samples for member in members)
        if candidates < settings.min_responses:
            raise RequestError(
                f"{candidates} answers were asked for, but {settings.min_responses} are needed (min_responses)",
                code="invalid_value",
                param="fusion",
            )
        judge = self._model("judge", self.options.judge) or self.config.judge
        synthesizer = self._model("synthesizer", self.options.synthesizer) or self.config.synthesizer
        if ending.needs is not None and {"judge": judge, "synthesizer": synthesizer}[ending.needs] is None:
            raise RequestError(f"mode {name!r} needs a {ending.needs}; none is configured", code="mode_unavailable")
        tools = bool(request.tools) and request.tool_choice != "none"
        if tools and not mode.takes_tools and settings.tools == "refuse":
            able = ", ".join(other for other in FUSED_MODES if mode_named(other).takes_tools)
            raise _unsupported("tools", f"'tools' are not supported in mode {name!r} here; use one of: {able}")
        if settings.cite and ending.cites and form is not None:
            raise _unsupported("response_format", "'cite' marks paragraphs, and JSON has none; drop one of the two")
        return Plan(
            model=request.model,
            mode=name,
            messages=messages,
            parameters=request.sent((*_SAMPLING, *_TOOLS) if tools or mode.takes_tools else _SAMPLING),
            members=members,
            settings=settings,
            judge=judge,
            synthesizer=synthesizer,
            tools=tools,
            output=form,
            skipped=skipped,
            domain=self.options.domain or _metadata_domain(request.metadata),
        )

    def _members(self, *, with_images: bool) -> tuple[tuple[Member, ...], tuple[str, ...]]:
        """Returns (the members to ask, the names of those that are skipped because they take no images)."""
        members, samples = self.config.members, self.options.samples
        if self.options.members is not None:
            members = _chosen(self.options.members, self.config)
        if samples is not None:
            members = tuple(member.model_copy(update={"samples": samples}) for member in members)
        if not with_images:
            return members, ()
        able = tuple(member for member in members if member.images)
        if not able:
            raise _unsupported("messages", "none of the members takes images (`images: true` in the config)")
        return able, tuple(member.name for member in members if not member.images)

    def _model(self, task: str, name: str | None) -> ModelConfig | None:
        """Returns the member or role that the options name for a task; None if they name none."""
        if name is None:
            return None
        known = [*(member.name for member in self.config.members), *self.role_names]
        if name not in known:
            message = f"there is no member or role {name!r}; {_near(name, known)}"
            raise RequestError(message, code="unknown_member", param=f"fusion.{task}")
        return _by_name(name, self.config, self.role_names)


def _metadata_domain(metadata: Any) -> str | None:
    domain = metadata.get("domain") if isinstance(metadata, dict) else None
    return domain if isinstance(domain, str) else None


def _output_format(request: ChatRequest) -> response_format.OutputFormat | None:
    if request.response_format is None:
        return None
    try:
        return response_format.read(request.response_format)
    except ValueError as error:
        raise RequestError(str(error), code="invalid_value", param="response_format") from None


def _unsupported(param: str, message: str) -> RequestError:
    return RequestError(message, code="unsupported_parameter", param=param)


def _chosen(names: tuple[str, ...], config: FusionConfig) -> tuple[Member, ...]:
    """Returns the members of these names, in the config's order."""
    known = [member.name for member in config.members]
    for name in names:
        if name not in known:
            message = f"there is no member {name!r}; {_near(name, known)}"
            raise RequestError(message, code="unknown_member", param="fusion.members")
    return tuple(member for member in config.members if member.name in names)


def _by_name(name: str, config: FusionConfig, role_names: list[str]) -> Member:
    """Returns a member by its name, with its defaults, or a role by its name, without defaults."""
    for member in config.members:
        if member.name == name:
            return member.model_copy(update={"samples": 1})
    if name in role_names:
        return Member(name=name, role=name)
    known = [*MODE_OF_MODEL, *config.presets, *(member.name for member in config.members), *role_names]
    raise RequestError(
        f"there is no model {name!r}; {_near(name, known)}", code="model_not_found", param="model", status=404
    )


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(dict.fromkeys(known))}"
