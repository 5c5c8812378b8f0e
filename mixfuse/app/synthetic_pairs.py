"""Synthetic pairs: a right answer against the same answer made worse, or against the answer to another prompt."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixfuse.app.pairs_spec import Damage, Source
from mixfuse.app.prompts import prompt_of
from mixfuse.contracts.files import iter_jsonl, refuse_halves
from mixfuse.train.data.pairs import Preference

_NUMBER = re.compile(r"\d+")


def read_synthetic(source: Source, seed: int) -> tuple[list[Preference], Counter[str]]:
    """Makes synthetic pairs from the rows of a source.

    Returns:
        The pairs, and counts for the data card. Rows without a right answer are only counted.

    Raises:
        MixfuseError: The file is missing or a row has no prompt.
    """
    counts: Counter[str] = Counter()
    rights: list[tuple[str, str]] = []
    for number, row in iter_jsonl(Path(source.path)):
        refuse_halves(row, f"{source.path}:{number}")
        counts["rows"] += 1
        prompt, right = prompt_of(row, f"{source.path}:{number}"), _right(row)
        if right is None:
            counts["rows without a right answer"] += 1
        else:
            rights.append((prompt, right))
    by_length = sorted(rights, key=lambda pair: (len(pair[1]), pair))
    preferences = []
    for place, (prompt, right) in enumerate(by_length):
        rng = random.Random(hashlib.sha256(f"{seed}:{prompt!r}".encode()).digest())  # noqa: S311 - no secret
        for damage in source.damage:
            worse = _damaged(right, damage, rng) if damage != "wrong_question" else _other(by_length, place)
            if worse is None or worse == right:
                counts[f"not made: {damage}"] += 1
            else:
                preferences.append(Preference(prompt, right, worse, f"{source.label}:{damage}"))
    return preferences, counts


def _right(row: dict[str, Any]) -> str | None:
    """The reference, else the first answer marked correct, else the assistant's last message."""
    messages = _objects(row.get("messages"))
    replies = [message.get("content") for message in messages if message.get("role") == "assistant"]
    responses = _objects(row.get("responses"))
    marked = [response.get("text") for response in responses if response.get("correct")]
    for text in (row.get("reference"), *marked[:1], *replies[-1:]):
        if isinstance(text, str) and text.strip():
            return text
    return None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _damaged(text: str, damage: Damage, rng: random.Random) -> str | None:
    """The text made worse; None if this damage does not apply to it."""
    if damage == "number":
        numbers = list(_NUMBER.finditer(text))
        if not numbers:
            return None
        last = numbers[-1]
        # The number keeps its length, which would otherwise give the wrong answer away.
        digits = list(last[0])
        place = rng.randrange(len(digits))
        first = "123456789" if place == 0 and len(digits) > 1 else "0123456789"
        digits[place] = rng.choice([digit for digit in first if digit != digits[place]])
        return text[: last.start()] + "".join(digits) + text[last.end() :]
    words = list(re.finditer(r"\S+", text))
    if len(words) < 8:
        return None
    cut = words[round(len(words) * rng.uniform(0.4, 0.8))].start()
    if damage == "truncate":
        return text[:cut].rstrip()
    return f"{text} {text[cut:]}"  # repeats as much as "truncate" would have removed


def _other(rights: Sequence[tuple[str, str]], place: int) -> str | None:
    """The answer nearest in length that belongs to another prompt."""
    prompt, right = rights[place]
    for distance in range(1, len(rights)):
        for neighbour in (place - distance, place + distance):
            if 0 <= neighbour < len(rights) and rights[neighbour][0] != prompt and rights[neighbour][1] != right:
                return rights[neighbour][1]
    return None
