"""The prompts of evaluation sets and of other files of rows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixfuse.contracts import preferences
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, read_json

_PROMPT_KEYS = ("prompt", "question", "instruction", "input")
_COMPARISON = re.compile(r"^\[question (\w+)\]\n(.*?)\n\[A \1\]\n", re.DOTALL)
"""The prompt within a comparison of `judge_protocol`."""


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of an evaluation set or another file of rows: JSON lines, or one JSON list.

    A row has `prompt` (a text, or the comparison of a pairs file), `messages`, or the `question`, `instruction` or
    `input` of public benchmarks.

    Raises:
        MixfuseError: The file is missing, or a row has none of them.
    """
    if path.suffix == ".json":
        listed = read_json(path)
        if not isinstance(listed, list):
            raise MixfuseError(f"{path}: expected a list of rows")
        rows: Iterator[tuple[int, Any]] = enumerate(listed, start=1)
    else:
        rows = iter_jsonl(path)
    return [prompt_of(row, f"{path}:{number}") for number, row in rows]


def prompt_of(row: Any, where: str) -> str:
    """The prompt of one row.

    Args:
        row: The row as it was parsed.
        where: File and line, for the error.

    Raises:
        MixfuseError: The row has no prompt.
    """
    if isinstance(row, dict) and preferences.is_comparison(row):
        found = _compared(row)
        if found is not None:
            return found
    prompt = next((row[key] for key in _PROMPT_KEYS if key in row), None) if isinstance(row, dict) else None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = [message for message in row["messages"] if isinstance(message, dict)]
        prompt = next((message.get("content") for message in messages if message.get("role") == "user"), None)
    elif isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        comparison = _COMPARISON.match(str(prompt[-1].get("content")))
        prompt = comparison[2] if comparison else None
    if not isinstance(prompt, str):
        raise MixfuseError(f"{where}: the row has no prompt: neither {', '.join(_PROMPT_KEYS)} nor messages")
    return prompt


def _compared(row: dict[str, Any]) -> str | None:
    """The prompt of a comparison in a public shape, as `pairs build` reads it."""
    try:
        pairs = preferences.read([("", row)]).pairs
    except MixfuseError:
        return None
    return pairs[0].prompt if pairs else None
