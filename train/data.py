"""Chats for SFT: rows of `{id, messages}` read, checked, and split into prompt and completion."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.errors import MixfuseError
from mixfuse.files import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant")


def read_chats(path: Path) -> list[dict[str, Any]]:
    """Reads a chat file.

    Args:
        path: JSONL, each row with `messages`: a list of `{role, content}` that ends with the assistant's.

    Raises:
        MixfuseError: The file is missing or empty, or a row is no such chat (the message names file and row).
    """
    rows = read_jsonl(path, required=("messages",))
    for number, row in enumerate(rows, start=1):
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise MixfuseError(f"{path}: row {number}: messages must be a list of at least two")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise MixfuseError(f"{path}: row {number}: a message's role must be one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise MixfuseError(f"{path}: row {number}: a message's content must be a string")
        if messages[-1]["role"] != "assistant":
            raise MixfuseError(f"{path}: row {number}: the last message must be the assistant's")
    return rows


def chats_dataset(path: Path, tokenizer: Any, max_length: int) -> "Dataset":
    """Makes TRL's prompt-completion data set: the loss is on the last assistant message only.

    Raises:
        MixfuseError: As `read_chats`, or no chat fits `max_length`.
    """
    from datasets import Dataset

    rows = []
    chats = read_chats(path)
    for number, chat in enumerate(chats, start=1):
        prompt, completion = chat["messages"][:-1], chat["messages"][-1:]
        length = len(tokenizer.apply_chat_template(chat["messages"], tokenize=True, return_dict=False))
        if length <= max_length:
            rows.append({"id": str(chat.get("id", number)), "prompt": prompt, "completion": completion})
    if not rows:
        raise MixfuseError(f"{path}: no chat fits max_length {max_length}; raise it")
    if len(rows) < len(chats):
        print(f"{path}: left out {len(chats) - len(rows)} of {len(chats)} chats longer than {max_length} tokens")
    return Dataset.from_list(rows)
