"""The shapes of a chat that SFT reads, checked and turned into one: messages, ShareGPT, prompt and completion."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.sources import rows
from mixfuse.train.recipe import DataSource

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Chat(NamedTuple):
    """A checked chat.

    Attributes:
        id: The row's `id`, or its place.
        messages: `{role, content}` each; the last is the assistant's.
        where: The row's place (file and line, or name and row), for error messages.
    """

    id: str
    messages: list[dict[str, str]]
    where: str


def chats(source: DataSource) -> Iterator[Chat]:
    """Reads and checks the chats of a data set.

    Raises:
        MixfuseError: The data set cannot be read, or a row is not a chat that ends with the assistant's message.
    """
    for where, row in rows(source):
        yield Chat(str(row.get("id", where)), _messages(row, source.format, where), where)


def check_chats(sources: Sequence[DataSource]) -> None:
    """Reads every chat once and keeps none.

    Raises:
        MixfuseError: The same as `chats`.
    """
    for source in sources:
        for _ in chats(source):
            pass


def _messages(row: dict[str, Any], form: str, where: str) -> list[dict[str, str]]:
    """The messages of a row in any of the formats, checked."""
    if form == "auto":
        if "messages" not in row and "conversations" in row:
            form = "sharegpt"
        elif "messages" not in row and "prompt" in row and "completion" in row:
            form = "prompt_completion"
        else:
            form = "messages"
    keys = {"messages": ("messages",), "sharegpt": ("conversations",), "prompt_completion": ("prompt", "completion")}
    missing = next((key for key in keys[form] if key not in row), None)
    if missing is not None:
        raise MixfuseError(f"{where}: missing key {missing!r}")
    if form == "prompt_completion":
        pair = (("user", row["prompt"]), ("assistant", row["completion"]))
        messages: Any = [{"role": role, "content": content} for role, content in pair]
    elif form == "sharegpt" and isinstance(row["conversations"], list):
        messages = [
            {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            if isinstance(turn, dict)
            else turn
            for turn in row["conversations"]
        ]
    else:
        messages = row[keys[form][0]]
    if not isinstance(messages, list) or len(messages) < 2:
        raise MixfuseError(f"{where}: {keys[form][0]} must be a list of at least two")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise MixfuseError(f"{where}: a message's role must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise MixfuseError(f"{where}: a message's content must be a string")
    if messages[-1]["role"] != "assistant":
        raise MixfuseError(f"{where}: the last message must be the assistant's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
