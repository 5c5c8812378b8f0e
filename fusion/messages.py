"""Messages of a conversation as text: what judges, synthesizers, traces and exports read of them."""

import hashlib
from collections.abc import Sequence
from typing import Any

from mixfuse.contracts.judge_protocol import Message, as_question, text_of

__all__ = ["Message", "as_question", "images", "text_of", "with_system", "without_image_data"]


def images(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the image parts of a conversation, in order."""
    contents = [message.get("content") for message in messages]
    return [part for parts in contents if isinstance(parts, list) for part in parts if part["type"] == "image_url"]


def without_image_data(message: Message) -> Message:
    """Returns a message with a hash in place of each embedded image: traces would be mostly images otherwise."""
    if not isinstance(message.get("content"), list):
        return message

    def shortened(part: dict[str, Any]) -> dict[str, Any]:
        url = part["image_url"]["url"] if part["type"] == "image_url" else ""
        if not url.startswith("data:"):
            return part
        mark = f"{url.partition(',')[0]},sha256:{hashlib.sha256(url.encode()).hexdigest()}"
        return {**part, "image_url": {**part["image_url"], "url": mark}}

    return {**message, "content": [shortened(part) for part in message["content"]]}


def with_system(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """Puts instructions before the conversation, in its own system message: many templates take only one."""
    if system is None:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
