"""A chat completion request: parsed strictly, and planned against the config.

A parameter that the gateway does not support is refused by name, never dropped silently.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mixfuse.contracts import strict_yaml
from mixfuse.contracts.mode_names import FUSED_MODES, MODE_OF_MODEL, MODEL_PREFIX, SINGLE_MODEL_MODE
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.fusion.answering import response_format
from mixfuse.fusion.answering.pairwise_judge import FINALISTS
from mixfuse.fusion.answering.request import MAX_SEED, Plan
from mixfuse.fusion.config import FusionConfig, FusionOptions, Member, ModelConfig, Modes, refuse_disguised_numbers
from mixfuse.fusion.http import openrouter
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.messages import Message, images
from mixfuse.fusion.modes.registry import ending_mode, mode_named

_SAMPLING = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "response_format",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "user",
    "safety_identifier",
    "prompt_cache_key",
)
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_LOGPROBS = ("logprobs", "top_logprobs")

# Parameters of OpenAI's API that are not supported, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
}
_PARTS = ("text", "image_url")
# What the official clients add to an earlier answer when they write it out. Thoughts are for the client: they go to no
# model again, and some endpoints refuse them.
_OF_ANSWERS = frozenset(
    {"reasoning_content", "reasoning", "reasoning_details", "thinking", "annotations", "parsed", "fusion"}
)
_THOUGHT_PARTS = frozenset({"thinking", "reasoning"})
LONGEST_MESSAGE = 500
_MOST_FALLBACKS = 16
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
        if self.name is not None:
            message["name"] = self.name
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


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""OpenAI's `metadata`: notes on the request."""


class ChatRequest(BaseModel):
    """The request body, with the supported parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1)
    models: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=_MOST_FALLBACKS)
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    seed: int | None = Field(default=None, ge=-(2**63), le=MAX_SEED)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    include_reasoning: bool | None = None
    metadata: Metadata | None = None
    fusion: FusionOptions | None = None
    plugins: tuple[openrouter.Plugin, ...] | None = None

    _numbers = field_validator("*", mode="before")(classmethod(refuse_disguised_numbers))

    @property
    def plugin(self) -> openrouter.Plugin | None:
        """OpenRouter's plugin, if there is one that acts."""
        return next((plugin for plugin in self.plugins or () if plugin.enabled), None)

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
    fields = {key: value for key, value in body.items() if value is not None}
    fields = openrouter.tool_as_plugin(fields)
    if "model" not in fields and isinstance(fields.get("models"), list) and fields["models"]:
        fields["model"] = fields["models"][0]  # OpenRouter's clients name either
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
            strict_yaml.describe(error, ChatRequest)[:LONGEST_MESSAGE], code=code, param=location
        ) from None
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", code="invalid_value", param="top_logprobs")
    for place, message in enumerate(request.messages):
        _check_shape(message, f"messages.{place}")
    return request


def _without_nulls(message: object, place: int) -> object:
    """Removes what clients send back from `model_dump` and no model needs; refuses audio and files."""
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") == "assistant":
        message = _as_asked(message)
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] not in _PARTS:
            raise RequestError(
                f"a content part of type {part['type']!r} is not supported here; text and image_url are",
                code="unsupported_parameter",
                param=f"messages.{place}.content",
            )
    return message


def _as_asked(message: dict[str, Any]) -> dict[str, Any]:
    """Returns an earlier answer, as a client's library writes it, in the form in which it is asked about."""
    message = {key: value for key, value in message.items() if key not in _OF_ANSWERS}
    refusal = message.pop("refusal", None)
    if isinstance(content := message.get("content"), list):
        message["content"] = [
            {"type": "text", "text": part.get("refusal")}
            if isinstance(part, dict) and part.get("type") == "refusal"
            else part
            for part in content
            if not (isinstance(part, dict) and part.get("type") in _THOUGHT_PARTS)
        ]
    if isinstance(refusal, str) and not message.get("content"):
        message["content"] = refusal
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call_as_asked(call) for call in calls]
    return message


def _call_as_asked(call: object) -> object:
    """Returns a tool call without its place in a stream and without what a client's library parsed of it."""
    if not isinstance(call, dict):
        return call
    call = {key: value for key, value in call.items() if value is not None and key != "index"}
    if isinstance(function := call.get("function"), dict):
        call["function"] = {key: value for key, value in function.items() if key != "parsed_arguments"}
    return call


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
        models = [by_name(name, config, role_names) for name in dict.fromkeys([request.model, *(request.models or ())])]
        return _plan_single_model(request, models, config, messages, form)
    if request.models is not None and request.models != (request.model,):
        raise _unsupported("models", f"'models' are fallbacks of a member or a role, not of {request.model!r}")
    if request.logprobs:
        raise _unsupported("logprobs", "a fused answer has no 'logprobs'")
    options = _own_options(request).over(options)
    return _FusedPlanner(request, options, config, role_names).plan(messages, form)


def missing(options: FusionOptions, config: FusionConfig) -> str | None:
    """Returns what a mode needs and neither the options nor the config name: "judge" or "synthesizer"; else None."""
    needed = ending_mode(options.mode or "best_of", options.settings(config.modes)).needs
    if needed is None:
        return None
    return needed if getattr(options, needed) is None and getattr(config, needed) is None else None


def _plan_single_model(
    request: ChatRequest,
    models: list[Member],
    config: FusionConfig,
    messages: tuple[Message, ...],
    form: response_format.OutputFormat | None,
) -> Plan:
    """Plans a request for one model, with those that answer if it fails."""
    options = _own_options(request)
    if options.model_fields_set - {"expose", "cache", "include_reasoning"}:
        message = (
            "'fusion' options other than 'expose', 'cache' and 'include_reasoning' go with a "
            f"{MODEL_PREFIX}… model or a preset, not with "
        )
        raise _unsupported("fusion", f"{message}{request.model!r}")
    if request.stream and request.logprobs:
        raise _unsupported("logprobs", "'logprobs' are not streamed")
    able = tuple(model for model in models if model.images or not images(messages))
    if not able:
        names = " and ".join(repr(model.name) for model in models)
        raise _unsupported("messages", f"{names} take no images (`images: true` in the config says which members do)")
    skipped = tuple(model.name for model in models if model not in able)
    parameters = request.sent((*_SAMPLING, *_TOOLS, *_LOGPROBS))
    settings = options.settings(config.modes)
    return Plan(
        request.model,
        SINGLE_MODEL_MODE,
        messages,
        parameters,
        able,
        settings,
        output=form,
        skipped=skipped,
        metadata=request.metadata,
    )


def _own_options(request: ChatRequest) -> FusionOptions:
    """Returns the request's own options; `include_reasoning` may also stand beside them, as at other gateways."""
    options = request.fusion or FusionOptions()
    if request.include_reasoning is None or options.include_reasoning is not None:
        return options
    return options.model_copy(update={"include_reasoning": request.include_reasoning})


def _options_of_name(request: ChatRequest, config: FusionConfig) -> FusionOptions | None:
    """Returns the options that the model name and the plugins stand for; None if they name no mode or preset."""
    if request.plugins is not None and not config.openrouter_alias:
        raise RequestError(
            "OpenRouter's form of requests ('plugins', the tool 'openrouter:fusion') is off here; "
            "the config allows it with openrouter_alias: true",
            code="unknown_parameter",
            param="plugins",
        )
    if request.model in MODE_OF_MODEL:
        named = FusionOptions(mode=MODE_OF_MODEL[request.model])
    elif request.model in config.presets:
        named = config.presets[request.model].over(FusionOptions(mode="best_of"))
    elif config.openrouter_alias and request.model == openrouter.MODEL:
        named = FusionOptions(mode="merge")
    else:
        named = None
    plugin = request.plugin
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
        self._check_caps()
        members, skipped = self._members(with_images=bool(images(messages)))
        candidates = sum(member.samples for member in members)
        calls = planned_calls(name, candidates, settings)
        if calls > self.config.caps.calls:
            raise RequestError(
                f"this may take {calls} calls; at most {self.config.caps.calls} are allowed here (caps.calls): "
                "ask for fewer members, samples or rounds",
                code="invalid_value",
                param="fusion",
            )
        if candidates < settings.min_responses:
            raise RequestError(
                f"{candidates} answers were asked for, but {settings.min_responses} are needed (min_responses)",
                code="invalid_value",
                param="fusion",
            )
        judge = self._model("judge", self.options.judge) or self.config.judge
        synthesizer = self._model("synthesizer", self.options.synthesizer) or self.config.synthesizer
        if needed := missing(self.options, self.config):
            raise RequestError(f"mode {name!r} needs a {needed}; none is configured", code="mode_unavailable")
        tools = bool(request.tools) and request.tool_choice != "none"
        if tools and not mode.takes_tools and settings.tools == "refuse":
            able = ", ".join(other for other in FUSED_MODES if mode_named(other).takes_tools)
            raise _unsupported("tools", f"'tools' are not supported in mode {name!r} here; use one of: {able}")
        own = request.fusion
        if own is not None and own.analysis and ending.needs != "synthesizer":
            raise _unsupported("fusion.analysis", f"'fusion.analysis' goes with merge, not with {name!r}")
        if settings.cite and ending.cites and form is not None:
            raise _unsupported("response_format", "'cite' marks paragraphs, and JSON has none; drop one of the two")
        return Plan(
            model=request.model,
            mode=name,
            messages=messages,
            parameters=_panel_parameters(request, (*_SAMPLING, *_TOOLS) if tools or mode.takes_tools else _SAMPLING),
            members=members,
            settings=settings,
            judge=judge,
            synthesizer=synthesizer,
            tools=tools,
            output=form,
            skipped=skipped,
            domain=self.options.domain or (request.metadata or {}).get("domain"),
            metadata=request.metadata,
        )

    def _check_caps(self) -> None:
        """Refuses what the request itself asks for beyond the config's caps; a preset may have more.

        Raises:
            RequestError: It asks for too much.
        """
        caps, own = self.config.caps, self.request.fusion
        for option, cap in (("samples", caps.samples), ("max_rounds", caps.rounds), ("deadline_ms", caps.deadline_ms)):
            asked = getattr(own, option) if own is not None else None
            if asked is not None and asked > cap:
                raise RequestError(
                    f"'fusion.{option}' is {asked:g}; at most {cap:g} is allowed here",
                    code="invalid_value",
                    param=f"fusion.{option}",
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
        return by_name(name, self.config, self.role_names)


def planned_calls(mode: str, candidates: int, settings: Modes) -> int:
    """Returns the most calls that a request takes, retries and hedges aside.

    Args:
        mode: The mode's name.
        candidates: The answers that it asks for.
        settings: How it waits and ends.
    """
    debates = mode_named(mode).debates
    rounds = settings.max_rounds if debates else 0
    judged = mode == "auto" or ending_mode(mode, settings).needs == "judge"
    pairs = candidates + 2 if candidates > FINALISTS else candidates * (candidates - 1) // 2
    return candidates * (1 + rounds) + (2 * pairs if judged else 2)


def _panel_parameters(request: ChatRequest, names: Sequence[str]) -> dict[str, Any]:
    """Returns the parameters of the request, and of OpenRouter's plugin those that the request leaves unset."""
    own = request.sent(names)
    below = request.plugin.parameters() if request.plugin else {}
    if "max_completion_tokens" in own:
        below.pop("max_tokens", None)
    return {**below, **own}


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


def by_name(name: str, config: FusionConfig, role_names: list[str]) -> Member:
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
