"""A file of pairs for people to vote on, and the file of their votes beside it.

The pairs are whatever `mixfuse.contracts.preferences` reads, with or without a label. A vote is a row of the file
`NAME.votes.jsonl`, in the shape of the public arena data, which that reader reads too: `pairs build`, `train judge` and
`eval judge` take the file as it is. The file of pairs is never written.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mixfuse.contracts import preferences
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors, iter_objects, parse_json, reading
from mixfuse.contracts.judge_protocol import Message

_MOST_BYTES = 256 << 20
_MOST_VOTED_BYTES = 1 << 30
_WINNERS = {"first": "model_a", "second": "model_b", "tie": "tie", "bad": "tie (bothbad)"}
_VOTES = {winner: vote for vote, winner in _WINNERS.items()}


@dataclass(frozen=True)
class Pair:
    """Two answers to a question.

    Attributes:
        id: A hash of the texts.
        messages: The conversation; the last message is the user's.
        answers: The two answers, in the order of their texts: a pair is the same whichever comes first in the file.
        models: Who wrote them, where the file says so.
        label: What the file says, "first", "second" or "tie"; None if it says nothing.
    """

    id: str
    messages: tuple[Message, ...]
    answers: tuple[str, str]
    models: tuple[str, str] | None
    label: str | None


class PairsFile:
    """The pairs of a file and the votes on them.

    Args:
        path: A file of JSON objects, one a line or all in one array.

    Raises:
        MixfuseError: It cannot be read, a row holds no pair, or a line of the votes is malformed (the message names
            file and line); it holds nothing to vote on; or the file of votes is the file itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.votes_path = votes_beside(path)
        self.pairs: dict[str, Pair] = {}
        self.left_out: list[str] = []
        for labelled, found in zip((True, False), _read(path), strict=True):
            self.left_out += [f"{reason} {count}" for reason, count in found.left_out.items()]
            for pair in (_pair(comparison, labelled=labelled) for comparison in found.pairs):
                if pair.answers[0] != pair.answers[1]:
                    self.pairs.setdefault(pair.id, pair)
        if not self.pairs:
            raise MixfuseError(f"{path}: there is no pair to vote on ({', '.join(self.left_out) or 'no rows'})")
        self._lock = threading.Lock()
        self._place, self._lines = 0, 0
        self._votes: dict[str, dict[str, str]] = {}
        self.votes()

    def votes(self) -> dict[str, dict[str, str]]:
        """Returns person → pair → their last vote; what other processes added is read, too.

        Raises:
            MixfuseError: A line of the file of votes is malformed, or its user has no name that can be printed.
        """
        with self._lock:
            size = self.votes_path.stat().st_size if self.votes_path.exists() else 0
            if size < self._place:  # it was moved away: the votes begin anew
                self._place, self._lines, self._votes = 0, 0, {}
            if not size:
                return self._copy()
            with reading(self.votes_path), self.votes_path.open("rb") as stream:
                stream.seek(self._place)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # it is being written
                    self._place += len(line)
                    self._lines += 1
                    if line.strip():
                        self._take(line)
            return self._copy()

    def _copy(self) -> dict[str, dict[str, str]]:
        return {user: dict(votes) for user, votes in self._votes.items()}

    def _take(self, line: bytes) -> None:
        try:
            row = parse_json(line.decode())
        except ValueError as error:
            raise MixfuseError(f"{self.votes_path}:{self._lines}: malformed JSON: {error}; mend or remove it") from None
        if not isinstance(row, dict) or not isinstance(row.get("user"), str):
            return
        if not row["user"].isprintable():
            where = f"{self.votes_path}:{self._lines}"
            raise MixfuseError(f"{where}: 'user' is no name that can be printed; mend or remove the line")
        pair, vote = self.pairs.get(str(row.get("pair_id"))), _VOTES.get(str(row.get("winner")))
        if pair is not None and vote is not None:
            self._votes.setdefault(row["user"], {})[pair.id] = vote

    def following(self, user: str, skipped: Collection[str]) -> Pair | None:
        """Returns the first pair that a person has neither voted on nor skipped; None at the end."""
        known = self.votes().get(user, {})
        return next((pair for pair in self.pairs.values() if pair.id not in known and pair.id not in skipped), None)

    def add(self, pair: Pair, vote: str, user: str, comment: str) -> None:
        """Appends a vote to the file of votes, and waits until it is on the disk.

        The same vote of the same person again, as from a key that was hit twice, adds nothing unless it has a comment.

        Args:
            pair: What it is about.
            vote: One of `mixfuse.fusion.ui.votes.VOTES`.
            user: Who votes.
            comment: What they say to it; may be empty.

        Raises:
            MixfuseError: The file cannot be written, or has become too large (`disk`).
        """
        row: dict[str, Any] = {
            "pair_id": pair.id,
            "prompt": list(pair.messages),
            "response_a": pair.answers[0],
            "response_b": pair.answers[1],
            "winner": _WINNERS[vote],
        }
        if pair.models is not None:
            row |= {"model_a": pair.models[0], "model_b": pair.models[1]}
        row |= {"user": user, **({"comment": comment} if comment else {}), "voted_at": round(time.time(), 3)}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with disk_errors(self.votes_path), self.votes_path.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Under the lock: two requests with the same vote may come at once.
            if not comment and self.votes().get(user, {}).get(pair.id) == vote:
                return
            if stream.seek(0, os.SEEK_END) + len(line) > _MOST_VOTED_BYTES:
                message = f"{self.votes_path}: more than {_MOST_VOTED_BYTES >> 30} GiB of votes; move it away"
                raise MixfuseError(message, kind="disk")
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read() == b"\n" else b"\n" + line  # after a write that was cut off
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())


def votes_beside(path: Path) -> Path:
    """Returns where the votes on a file of pairs go: `pairs.jsonl` → `pairs.votes.jsonl`.

    Raises:
        MixfuseError: That is the file itself, by a link, or no regular file; or it cannot be written.
    """
    votes = path.with_name(f"{path.name.removesuffix('.gz').rpartition('.')[0] or path.name}.votes.jsonl")
    if votes.exists() and path.exists() and votes.samefile(path):
        raise MixfuseError(f"{votes}: the votes would go into the file of pairs itself; remove this link")
    if votes.exists() and not votes.is_file():
        raise MixfuseError(f"{votes}: the votes go there, and it is no regular file; move it away", kind="disk")
    if path.exists() and not os.access(votes if votes.exists() else votes.parent, os.W_OK):
        raise MixfuseError(f"{votes}: the votes go there, and it cannot be written", kind="disk")
    return votes


def pairs_at(path: Path) -> PairsFile:
    """Returns a file of pairs, which is read once, and again when it has changed.

    Raises:
        MixfuseError: As `PairsFile`.
    """
    with reading(path):
        found = path.stat()
    if not path.is_file():
        raise MixfuseError(f"{path}: no regular file; name a file of pairs, one JSON object a line")
    return _kept(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=2)
def _kept(path: Path, _changed: int, size: int) -> PairsFile:
    if size > _MOST_BYTES:
        raise MixfuseError(f"{path}: it is larger than {_MOST_BYTES >> 20} MiB; vote on a part of it")
    return PairsFile(path)


def _read(path: Path) -> tuple[preferences.Preferences, preferences.Preferences]:
    """Reads a file: the pairs with a label, and those without one."""
    rows: dict[bool, list[tuple[str, Mapping[str, Any]]]] = {True: [], False: []}
    for place, row in iter_objects(path):
        whole = preferences.with_label(row)
        rows[whole is row].append((place, whole))
    return preferences.read(rows[True]), preferences.read(rows[False])


def _pair(comparison: preferences.Comparison, *, labelled: bool) -> Pair:
    messages = comparison.conversation or ({"role": "user", "content": comparison.prompt},)
    first, second = comparison.first, comparison.second
    swapped = second < first
    label: str | None = comparison.label
    if swapped:
        label = {"first": "second", "second": "first"}.get(comparison.label, "tie")
    answers = (second, first) if swapped else (first, second)
    models = comparison.models
    return Pair(
        id=preferences.pair_hash(comparison.prompt, *answers)[:16],
        messages=tuple(messages),
        answers=answers,
        models=models and ((models[1], models[0]) if swapped else models),
        label=label if labelled else None,
    )
