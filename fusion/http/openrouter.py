"""OpenRouter's form of requests for its Fusion: the plugin `fusion`, and the tool `openrouter:fusion`.

Source: OpenRouter's guides "Fusion" of plugins and of server tools, as of November 2026.
"""

from typing import Any, Literal

from pydantic import Field

from mixfuse.contracts.strict_yaml import Strict
from mixfuse.fusion.http.statuses import RequestError

MODEL = "openrouter/fusion"
"""OpenRouter's name for its Fusion; answered by `merge` if the config allows it."""

_TOOL = "openrouter:fusion"


class Reasoning(Strict):
    """How much the models of a panel think."""

    effort: str


class Plugin(Strict):
    """The plugin `fusion`, and the parameters of the tool.

    Attributes:
        id: Always `fusion`.
        enabled: Whether it acts on this request.
        preset: A preset of the config.
        analysis_models: The members to ask.
        model: The judge and the synthesizer.
        max_tool_calls: The most searches of a panel's model. There are none here, so every limit is kept.
        max_completion_tokens: The most tokens of an answer, where the request does not say.
        temperature: Where the request does not say.
        reasoning: Where the request does not say.
    """

    id: Literal["fusion"]
    enabled: bool = True
    preset: str | None = None
    analysis_models: tuple[str, ...] | None = Field(default=None, min_length=1)
    model: str | None = None
    max_tool_calls: int | None = Field(default=None, ge=1, le=16)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    reasoning: Reasoning | None = None

    def parameters(self) -> dict[str, Any]:
        """Returns the parameters of a chat completion that it sets."""
        effort = self.reasoning.effort if self.reasoning else None
        own = {
            "max_tokens": self.max_completion_tokens,
            "temperature": self.temperature,
            "reasoning_effort": effort,
        }
        return {name: value for name, value in own.items() if value is not None}


def tool_as_plugin(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a request body with the tool `openrouter:fusion` as the plugin that it stands for.

    At OpenRouter the model decides whether to call the tool. Here the members are always asked, unless `tool_choice` is
    "none".

    Raises:
        RequestError: The tool's parameters are no object, or it is there twice.
    """
    tools = fields.get("tools")
    if not isinstance(tools, list):
        return fields
    fused = [tool for tool in tools if isinstance(tool, dict) and tool.get("type") == _TOOL]
    if not fused:
        return fields
    parameters = fused[0].get("parameters", {})
    if len(fused) > 1 or not isinstance(parameters, dict) or fused[0].keys() - {"type", "parameters"}:
        raise RequestError(
            f"the tool {_TOOL!r} may stand in 'tools' once, with 'parameters' alone",
            code="invalid_value",
            param="tools",
        )
    rest = [tool for tool in tools if tool is not fused[0]]
    plugin = {**parameters, "id": "fusion", "enabled": fields.get("tool_choice") != "none"}
    changed = {**fields, "tools": rest, "plugins": [*(fields.get("plugins") or ()), plugin]}
    if not rest:
        changed = {key: value for key, value in changed.items() if key not in ("tools", "tool_choice")}
    return changed
