"""The combiner that a gateway serves, as a file with a history: swapped in one step, and rolled back.

Beside `combiner.json` stands the folder `combiner.json.history`, with every combiner that was swapped out, oldest
first: `0001-REVISION.json`. A gateway reads the file again when it changes, so a swap needs no request to it.
"""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors
from mixfuse.fusion.combiner.artefact import Combiner, load, save


class Swapped(NamedTuple):
    """A change of the file.

    Attributes:
        old: The revision that it held; None if there was no file.
        new: The revision that it holds.
    """

    old: str | None
    new: str


def swap(new: Path, file: Path) -> Swapped:
    """Puts a combiner in the file's place, and the one that it held into the history.

    Raises:
        MixfuseError: The new one is no combiner, knows no member of the old one, or the disk refuses.
    """
    _no_folder(file)
    combiner = load(new)
    with _locked(file):
        old = load(file) if file.exists() else None
        if old is not None and not set(old.members) & set(combiner.members):
            raise MixfuseError(
                f"{new}: it knows none of the members of {file} ({', '.join(old.members)}); "
                "fit it to that pool's answers"
            )
        if old is not None and old.revision == combiner.revision:
            return Swapped(old.revision, combiner.revision)
        if old is not None:
            _keep(file, old)
        _replace(combiner, file)
        return Swapped(old.revision if old else None, combiner.revision)


def rollback(file: Path) -> Swapped:
    """Puts the combiner that was swapped out last back into the file.

    Raises:
        MixfuseError: None was swapped out, it cannot be read, or the disk refuses.
    """
    _no_folder(file)
    if not file.parent.is_dir():
        raise MixfuseError(f"{file}: no such folder: {file.parent}")
    with _locked(file):
        kept = history(file)
        if not kept:
            raise MixfuseError(f"{file}: no combiner was swapped out of it; there is nothing to roll back to")
        last = load(kept[-1])
        current = load(file).revision if file.exists() else None
        _replace(last, file)
        with disk_errors(kept[-1]):
            kept[-1].unlink()
        return Swapped(current, last.revision)


def history(file: Path) -> list[Path]:
    """Returns the combiners that were swapped out, oldest first.

    Raises:
        MixfuseError: The file is a folder.
    """
    _no_folder(file)
    folder = _folder(file)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"\d{4,}-[0-9a-f]{12}\.json", path.name))


def _keep(file: Path, old: Combiner) -> None:
    folder = _folder(file)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    kept = history(file)
    number = int(kept[-1].name.partition("-")[0]) + 1 if kept else 1
    target = folder / f"{number:04}-{old.revision}.json"
    with disk_errors(target):
        shutil.copyfile(file, target)


def _replace(combiner: Combiner, file: Path) -> None:
    with disk_errors(file):
        save(combiner, file)  # written beside it and renamed: a gateway reads the old one or the new one


def _no_folder(file: Path) -> None:
    if file.is_dir():
        raise MixfuseError(f"{file}: a folder; give the file that the gateway's config names as `combiner`")


def _folder(file: Path) -> Path:
    return file.with_name(f"{file.name}.history")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keeps other processes from changing the file meanwhile."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_name(f".{file.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
