"""Private copies of adapters: the engine reads the bytes that were verified, and only those.

vLLM reads an adapter's folder again whenever its cache has dropped the adapter, at the time of a request, and checks
nothing. So it never gets the folder that a user named. It gets a copy that is hashed while it is made, that nobody but
this user can write, and whose name is the hash of its bytes. A copy stays as long as a role can need it.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from mixfuse.contracts.adapter import CONFIG, WEIGHTS
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors, sha256_file, sha256_json

logger = logging.getLogger(__name__)

SERVED_FILES = (CONFIG, WEIGHTS)
"""What vLLM reads of an adapter."""
PREFIX = "sha256-"
_LOCK = ".lock"
_PIECE = 1 << 22


def copy_name(hashes: Mapping[str, str]) -> str:
    """The name of the copy of an adapter whose files have these SHA-256 hashes; other files do not count."""
    return PREFIX + sha256_json({name: hashes[name] for name in SERVED_FILES})


class AdapterCopies:
    """The copies of one server, in a folder of its own. What a killed server left is removed by the next one.

    Args:
        root: The folder for the copies of all servers; None: a temporary folder.
        others_read: Whether other users may read the copies, because an engine runs as another user. Nobody else may
            write them in any case.

    Raises:
        MixfuseError: The folder cannot be made, or belongs to somebody else.
    """

    def __init__(self, root: Path | None = None, *, others_read: bool = False) -> None:
        self._folder_mode, self._file_mode = (0o555, 0o444) if others_read else (0o500, 0o400)
        self._uses: dict[Path, int] = {}
        self._lock = threading.Lock()  # copies are made one at a time
        if root is None:
            self.folder = Path(tempfile.mkdtemp(prefix="mixfuse-adapters-")).resolve()
            self.folder.chmod(self._folder_mode | stat.S_IWUSR)
            self._held = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        else:
            # Without links, as vLLM is told it and says it again.
            self.folder, self._held = _own_folder(root.resolve(), self._folder_mode | stat.S_IWUSR)
        weakref.finalize(self, _end, self.folder, self._held)

    def keep(self, directory: Path, hashes: Mapping[str, str]) -> Path:
        """Copies an adapter, or uses the copy that is there already. Call `release` once for each call.

        Args:
            directory: The adapter directory.
            hashes: File → SHA-256, as verified.

        Returns:
            The copy's absolute path.

        Raises:
            MixfuseError: The files are not those that were verified (kind "adapter"), or the disk is full.
        """
        missing = [name for name in SERVED_FILES if name not in hashes]
        if missing:
            raise MixfuseError(f"{directory}: its manifest does not list {missing[0]}", kind="adapter")
        path = self.folder / copy_name(hashes)
        with self._lock:
            if not path.exists() or _changed(path, hashes):
                with disk_errors(path):
                    self._make(directory, hashes, path)
            self._uses[path] = self._uses.get(path, 0) + 1
        return path

    def check(self, path: Path, hashes: Mapping[str, str]) -> None:
        """Raises a MixfuseError if a copy is not what it was; it is read whole."""
        if name := _changed(path, hashes):
            raise MixfuseError(f"{path / name} was changed or removed after it was verified", kind="adapter")

    def release(self, path: Path) -> None:
        """Removes a copy unless another call of `keep` still needs it."""
        with self._lock:
            left = self._uses.pop(path, 1) - 1
            if left > 0:
                self._uses[path] = left
            else:
                _remove(path)

    def close(self) -> None:
        """Removes all copies."""
        _end(self.folder, self._held)

    def _make(self, directory: Path, hashes: Mapping[str, str], path: Path) -> None:
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            for name in SERVED_FILES:
                if _copy(directory / name, partial / name, self._file_mode) != hashes[name]:
                    raise MixfuseError(f"{directory / name} was changed while it was being read", kind="adapter")
            if path.exists():  # damaged; an engine that has it open keeps what it has
                logger.warning("%s was changed; it is made again", path)
                _remove(path)
            partial.rename(path)
            path.chmod(self._folder_mode)
        finally:
            _remove(partial)


def _copy(source: Path, target: Path, mode: int) -> str:
    """Copies a regular file and returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    try:
        # A named pipe would keep a blocking open waiting for ever.
        reading = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise MixfuseError(f"cannot read {source}: {error.strerror}", kind="adapter") from None
    with open(reading, "rb") as stream:
        if not stat.S_ISREG(os.fstat(reading).st_mode):
            raise MixfuseError(f"{source} is no regular file", kind="adapter")
        with target.open("xb") as copy:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                copy.write(piece)
    target.chmod(mode)
    return digest.hexdigest()


def _changed(path: Path, hashes: Mapping[str, str]) -> str | None:
    """The first file of a copy that is not what it was; None if all are, and there are no others."""
    try:
        if extra := {file.name for file in path.iterdir()} - set(SERVED_FILES):
            return min(extra)
    except OSError:
        return SERVED_FILES[0]
    for name in SERVED_FILES:
        try:
            if sha256_file(path / name) != hashes[name]:
                return name
        except OSError:
            return name
    return None


def _own_folder(root: Path, mode: int) -> tuple[Path, int]:
    """Makes a folder for one server in `root`, and removes those of servers that are gone. A lock tells them apart."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        if root.stat().st_uid != os.geteuid():
            raise MixfuseError(f"{root} belongs to another user, who could change the adapters in it; choose another")
        root.chmod(mode)
        with (root / _LOCK).open("w") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX)
            except OSError as error:
                raise MixfuseError(
                    f"{root / _LOCK} cannot be locked: {error.strerror}; set `state` to a folder on another file system"
                ) from None
            for left in root.glob("server-*"):
                if (held := _locked(left)) is not None:
                    _end(left, held)
            folder = Path(tempfile.mkdtemp(prefix="server-", dir=root))
            folder.chmod(mode)
            held = _locked(folder)
            assert held is not None  # noqa: S101 - the folder is new, and nobody else has the turn
    return folder, held


def _locked(folder: Path) -> int | None:
    """Locks a server's folder; None if its server still runs."""
    held = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def _end(folder: Path, held: int) -> None:
    if folder.exists():
        for path in folder.iterdir():
            _remove(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir():
        path.chmod(0o700)  # of a folder without write permission, nothing can be removed
        shutil.rmtree(path, ignore_errors=True)
