"""Questions with reference answers, from data files, and whether an answer says what the reference does."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl
from mixfuse.fusion.answering.agreement import text_key


@dataclass(frozen=True)
class Question:
    """A task from a data file: what is asked, and a reference answer."""

    id: str
    prompt: str
    reference: str
    domain: str | None = None


Verifier = Literal["exact", "number", "json", "regex"]


def read_questions(paths: Sequence[Path], *, limit: int | None = None) -> list[Question]:
    """Reads tasks from rows with `prompt` and `reference`, or with `messages`: a question and its answer.

    Args:
        paths: JSONL files; of rows with one prompt the first counts.
        limit: Only the first so many rows of each.

    Raises:
        MixfuseError: A row has neither shape (the message names file and line), or there are none.
    """
    found: dict[str, Question] = {}
    for path in paths:
        for number, row in islice(iter_jsonl(path), limit):
            match row:
                case {"prompt": str(prompt), "reference": str(reference)}:
                    pass
                case {
                    "messages": [{"role": "user", "content": str(prompt)}, {"role": "assistant", "content": reference}]
                }:
                    pass
                case _:
                    raise MixfuseError(
                        f"{path}:{number}: no task: it needs 'prompt' and 'reference', or 'messages' with a question "
                        "and its answer"
                    )
            digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:16]
            found.setdefault(prompt, Question(digest, prompt, str(reference)))
    if not found:
        raise MixfuseError(f"{', '.join(map(str, paths))}: there are no tasks")
    return list(found.values())


def matches(question: Question, text: str, how: Verifier) -> bool:
    """Whether an answer says what the reference does; `number`: the last one in each; `regex`: the reference is found.

    Raises:
        MixfuseError: The reference is no regular expression.
    """
    if how != "regex":
        return text_key(text, how) == text_key(question.reference, how)
    try:
        return re.search(question.reference, text) is not None
    except re.error as error:
        raise MixfuseError(f"task {question.id}: the reference is no regular expression: {error}") from None
