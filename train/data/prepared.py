"""Data tokenised once: Arrow files in a cache that runs and their processes share.

An entry of the cache holds one data set. Its name is a digest of all that its tokens depend on: the bytes of the files,
the tokenizer, the chat template, the recipe's keys that count, and the code. Rows are read as a stream, tokenised in
batches and written as they come, so memory does not grow with their number.

One process prepares an entry, under a lock, in a temporary folder that is renamed when it is whole; the others wait for
it. The kernel frees the lock of a process that ends, however it ends, and the next one starts anew.
"""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import atomic_directory, disk_errors, read_json, sha256_file, sha256_json, write_json
from mixfuse.train.data.chats import Found
from mixfuse.train.data.sources import digest, hub_fingerprint, shared_out, short_names
from mixfuse.train.processes import worker
from mixfuse.train.recipe import DataSource, TrainRecipe

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

Item = TypeVar("Item")
RecipeT = TypeVar("RecipeT", bound=TrainRecipe)

FOLDER = "data-cache"
"""The cache, beside the run's folder, where the recipe names none."""
NOTE = "data/prepared.json"
"""In a run's folder until the run ends: the digest of its data."""
TRAIN, HELD_OUT = "train.arrow", "held-out.arrow"
_FACTS = "facts.json"
_BATCH, _BATCH_CHARACTERS = 256, 1 << 20  # items of a batch, and roughly the characters from which it is full
_ROWS, _BYTES = 1000, 1 << 25  # rows, or bytes, that are written together


class Outcome(NamedTuple):
    """What became of one item.

    Attributes:
        rows: Its rows; none if it is left out.
        held_out: Whether it is in the held-out share.
        left_out: Why it is left out, in words that follow "chats" or "pairs".
        reason: Of a bad item the error, else its place.
    """

    rows: Sequence[dict[str, Any]]
    held_out: bool = False
    left_out: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Kind(Generic[Item, RecipeT]):
    """How one kind of example is read and tokenised. Its functions are of a module, so that processes can be sent them.

    Attributes:
        plural: What examples are called.
        columns: Name → `string`, `int32`, `float64` or `tokens` (a list of int32).
        keys: The recipe's keys that decide on the tokens.
        read: Reads the items of a data set and counts them.
        encode: Tokenises one; its last argument is the share to hold out, or None.
        nothing_left: The error's text if no example is left.
        together: Rows of one example.
    """

    plural: str
    columns: dict[str, str]
    keys: Callable[[RecipeT], list[Any]]
    read: Callable[[DataSource, RecipeT, Found], Iterator[Item]]
    encode: Callable[[Item, Any, RecipeT, float | None], Outcome]
    nothing_left: Callable[[Found, RecipeT], str]
    together: int = 1

    def schema(self) -> "pyarrow.Schema":
        """The columns as Arrow's."""
        import pyarrow

        types = {"tokens": pyarrow.list_(pyarrow.int32())}
        return pyarrow.schema(
            [(name, types.get(kind) or getattr(pyarrow, kind)()) for name, kind in self.columns.items()]
        )


class Prepared(NamedTuple):
    """The entries of a run's data.

    Attributes:
        train: A folder for each data set of `data`.
        evaluation: A folder for each data set of `evaluation.data`.
        digest: Of the data and of how it is tokenised; the same for another version of this code.
    """

    train: list[Path]
    evaluation: list[Path]
    digest: str

    def training(self, recipe: TrainRecipe) -> "list[Dataset]":
        """The training rows of each data set, memory-mapped.

        Raises:
            MixfuseError: All rows of a data set are in the held-out share.
        """
        tables = []
        for source, folder in zip(recipe.data, self.train, strict=True):
            rows = _table(folder, TRAIN)
            if rows is None:
                raise MixfuseError(
                    f"{source.name}: all {facts(folder)['plural']} are in the held-out share; lower evaluation.share"
                )
            tables.append(rows)
        return tables

    def held_out(self, recipe: TrainRecipe) -> "Dataset":
        """The rows to evaluate on, by `evaluation.limit`. Each names its data set as `set`; a set's are neighbours.

        Raises:
            MixfuseError: There are none.
        """
        from datasets import concatenate_datasets

        evaluation = recipe.evaluation
        assert evaluation is not None  # noqa: S101 - the caller asked
        sources = evaluation.data or recipe.data
        folders, name = (self.evaluation, TRAIN) if evaluation.data else (self.train, HELD_OUT)
        found = [
            (set_name, rows, facts(folder)["together"])
            for set_name, folder in zip(short_names(sources), folders, strict=True)
            if (rows := _table(folder, name)) is not None
        ]
        if not found:
            singular = facts(self.train[0])["plural"].removesuffix("s")
            raise MixfuseError(
                f"no {singular} is in the held-out share; raise evaluation.share or name evaluation.data"
            )
        together = found[0][2]
        most = evaluation.limit and max(1, evaluation.limit // together)
        counts = shared_out(most, [len(rows) // together for _, rows, _ in found])
        parts = []
        for (set_name, rows, _), examples in zip(found, counts, strict=True):
            count = together * examples
            parts.append(rows.select(range(count)).add_column("set", [set_name] * count))
        return concatenate_datasets(parts)


def cache_folder(recipe: TrainRecipe) -> Path:
    """The folder of the cache."""
    return recipe.data_cache or recipe.out.parent / FOLDER


def prepare(kind: Kind[Any, Any], recipe: TrainRecipe, tokenizer: Any, *, resuming: bool = False) -> Prepared:
    """Prepares the data of a recipe, as far as the cache does not hold it.

    Args:
        kind: How its examples are read and tokenised.
        recipe: The recipe.
        tokenizer: The base's tokenizer.
        resuming: Whether the run has a checkpoint; then data that has changed since it began is refused.

    Raises:
        MixfuseError: A data set is missing or malformed, no example of it is left, or it has changed.
    """
    evaluation = recipe.evaluation
    sources = [(source, evaluation.share if evaluation else None) for source in recipe.data]
    sources += [(source, None) for source in (evaluation.data if evaluation else None) or ()]
    contents = [_content(kind, source, share, recipe, tokenizer) for source, share in sources]
    found = sha256_json(contents)
    note = recipe.out / NOTE
    if resuming and note.is_file() and read_json(note)["digest"] != found:
        raise MixfuseError(
            f"{recipe.out} holds a run to resume whose data has changed since it began; put the files back, choose "
            "another `out`, or remove the folder to start over"
        )
    entries = []
    for (source, share), content in zip(sources, contents, strict=True):
        folder = cache_folder(recipe) / sha256_json([content, _code()])[:24]
        _prepare(folder, _Job(kind, recipe, tokenizer, share), source, content["bytes"] if source.path else None)
        entries.append(folder)
    return Prepared(entries[: len(recipe.data)], entries[len(recipe.data) :], found)


def noted(prepared: Prepared, out: Path) -> Prepared:
    """Notes in a run's folder which data it trains on, so that a resumed run trains on no other.

    Returns:
        What process 0 prepared: a file may change while processes look at it.
    """
    agreed = worker.agree(prepared)
    if os.environ.get("RANK", "0") == "0":
        write_json(out / NOTE, {"digest": agreed.digest})
    return agreed


def _table(folder: Path, name: str) -> "Dataset | None":
    """The rows of an entry, memory-mapped; None if it has none."""
    from datasets import Dataset

    path = folder / name
    return Dataset.from_file(str(path)) if path.exists() else None


def facts(folder: Path) -> dict[str, Any]:
    """What an entry says of itself: `{name, plural, together, sha256, read, train, held_out, lines, sizes}`."""
    return dict(read_json(folder / _FACTS))


def _content(
    kind: Kind[Any, Any], source: DataSource, share: float | None, recipe: TrainRecipe, tokenizer: Any
) -> dict[str, Any]:
    """What the tokens of a data set depend on. Its files may move: of their paths only the names count, as in ids."""
    return {
        "kind": kind.plural,
        "name": source.path.name if source.path else [source.hub, source.subset, source.split],
        "bytes": digest(source) if source.path else hub_fingerprint(source),
        "format": source.format,
        "share": share,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "template": tokenizer.chat_template,
        "keys": kind.keys(recipe),
    }


@cache
def _code() -> str:
    """A digest of the code that decides on tokens: an entry of another version is not used."""
    import tokenizers
    import transformers

    from mixfuse import contracts, train

    files = [*(Path(train.__path__[0]) / "data").glob("*.py"), *Path(contracts.__path__[0]).glob("*.py")]
    code = {file.name: sha256_file(file) for file in sorted(files)}
    return sha256_json([code, transformers.__version__, tokenizers.__version__])


def _is_whole(folder: Path) -> bool:
    """Whether an entry is there, with all its files as long as they were."""
    if not (folder / _FACTS).is_file():
        return False
    sizes = facts(folder)["sizes"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


@dataclass(frozen=True)
class _Job:
    """What a process that tokenises needs. `share` is the share that is held out."""

    kind: Kind[Any, Any]
    recipe: Any
    tokenizer: Any
    share: float | None

    def __call__(self, items: list[Any]) -> "_Batch":
        """Tokenises a batch."""
        import pyarrow

        schema = self.kind.schema()
        outcomes = [self.kind.encode(item, self.tokenizer, self.recipe, self.share) for item in items]

        def side(held_out: bool) -> "pyarrow.RecordBatch":
            rows = [row for done in outcomes if done.held_out is held_out for row in done.rows]
            return pyarrow.RecordBatch.from_pylist(rows, schema=schema)

        left_out = [(done.left_out, done.reason) for done in outcomes if done.left_out]
        return _Batch(side(False), side(True), len(items), left_out)


class _Batch(NamedTuple):
    train: "pyarrow.RecordBatch"
    held_out: "pyarrow.RecordBatch"
    items: int
    left_out: list[tuple[str, str]]


def _prepare(folder: Path, job: _Job, source: DataSource, sha256: str | None) -> None:
    """Makes an entry, or waits for the process that does."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as alone:
            if not _is_whole(folder):
                if alone:
                    for left in folder.parent.glob(f".{folder.name}.*.partial*"):  # of a process that was killed
                        shutil.rmtree(left, ignore_errors=True)
                try:
                    with atomic_directory(folder, replace=folder.exists()) as temporary:
                        _write(temporary, job, source, sha256)
                except OSError:
                    if alone or not _is_whole(folder):  # else another run was faster
                        raise
                return
    stored = facts(folder)
    for line in () if worker.launched() else stored["lines"]:  # what launched this process has said it
        print(line.replace(stored["name"], source.name))
    if os.environ.get("RANK", "0") == "0":
        print(f"{source.name}: tokenised already, in {folder}")


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lets one process at a time, of all runs, prepare an entry; another waits until it is whole.

    Yields:
        Whether there are locks. A file system without them leaves the entry to rank 0; two runs at once then both
        prepare it, and the first one's is taken.
    """
    waits = os.environ.get("RANK", "0") != "0"
    path = folder.with_name(f".{folder.name}.lock")
    said = False
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):  # no locks here
                    while waits and not _is_whole(folder):
                        time.sleep(0.2)
                    yield False
                    return
            else:
                # Whoever had the lock before removes the file, and then this lock is of a file that no one else sees.
                if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    try:
                        yield True
                    finally:
                        path.unlink(missing_ok=True)
                    return
                continue
        if not said and not waits:
            print(f"waiting for another process that prepares {folder}", flush=True)
        said = True
        time.sleep(0.2)


def _write(folder: Path, job: _Job, source: DataSource, sha256: str | None) -> None:
    """Reads, tokenises and writes one data set, whose digest is known already.

    Raises:
        MixfuseError: It cannot be read, or no example is left.
    """
    found, kind = Found(), job.kind
    items = kind.read(source, job.recipe, found)
    with (
        _Writer(folder / TRAIN, kind) as train,
        _Writer(folder / HELD_OUT, kind) as held_out,
        _progress(source.name, kind.plural) as count,
    ):
        for batch in _mapped(job, _batches(items), job.recipe.data_processes):
            train.add(batch.train)
            held_out.add(batch.held_out)
            for why, reason in batch.left_out:
                found.leave_out(why, reason)
            count(batch.items)
    lines = found.lines(source.name, kind.plural)
    for line in lines:
        print(line)
    if not train.rows + held_out.rows:
        raise MixfuseError(f"{source.name}: {kind.nothing_left(found, job.recipe)}")
    files = sorted(folder.iterdir())
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    write_json(
        folder / _FACTS,
        {
            "name": source.name,
            "plural": kind.plural,
            "together": kind.together,
            "sha256": sha256,
            "read": found.rows,
            "train": train.rows,
            "held_out": held_out.rows,
            "lines": lines,
            "sizes": {file.name: file.stat().st_size for file in files},
        },
    )


class _Writer:
    """An Arrow stream file that is begun with its first row. `rows` counts what is in it."""

    def __init__(self, path: Path, kind: Kind[Any, Any]) -> None:
        self._path, self._schema = path, kind.schema()
        self._waiting: list[pyarrow.RecordBatch] = []
        self._stream: Any = None
        self.rows = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        if self._stream is not None:
            self._stream.close()

    def add(self, batch: "pyarrow.RecordBatch") -> None:
        """Writes rows, many at a time: a reader holds something in memory for each batch of a file."""
        if batch.num_rows:
            self._waiting.append(batch)
            self.rows += batch.num_rows
        if sum(b.num_rows for b in self._waiting) >= _ROWS or sum(b.nbytes for b in self._waiting) >= _BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._waiting:
            if self._stream is None:
                self._stream = pyarrow.ipc.new_stream(str(self._path), self._schema)
            self._stream.write_table(pyarrow.Table.from_batches(self._waiting, self._schema).combine_chunks())
            self._waiting = []


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Items in lists of many short ones or few long ones."""
    while first := list(islice(items, 1)):
        batch, size = first, len(str(first[0]))
        while len(batch) < _BATCH and size < _BATCH_CHARACTERS and (more := list(islice(items, 1))):
            batch += more
            size += len(str(more[0]))
        yield batch


@contextmanager
def _progress(name: str, plural: str) -> Iterator[Callable[[int], object]]:
    """Counts on standard error: twice a second at a terminal, every ten seconds in a log."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    terminal = sys.stderr.isatty()
    with tqdm(
        desc=f"tokenising {name}", unit=f" {plural}", mininterval=0.5 if terminal else 10, leave=terminal, delay=2
    ) as bar:
        yield bar.update


def _mapped(job: _Job, batches: Iterator[list[Any]], processes: int) -> Iterator[_Batch]:
    """Tokenises batches in their order, with a few of them under way.

    The processes are started anew: a fork would copy the locks that threads of other libraries hold.

    Raises:
        MixfuseError: A process was killed.
    """
    if processes == 1:
        yield from map(job, batches)
        return
    waiting: deque[Future[_Batch]] = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (job,))
    try:
        for batch in batches:
            waiting.append(pool.submit(_run, batch))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MixfuseError(
            "a process that tokenises the data was killed, most often because memory ran out; lower data_processes",
            kind="training",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_job: _Job | None = None


def _begin(job: _Job) -> None:
    """Prepares a process that tokenises: Ctrl-C is its parent's to handle, and without its parent it ends."""
    global _job  # noqa: PLW0603 - a process has one job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - this runs in a child

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(items: list[Any]) -> _Batch:
    assert _job is not None  # noqa: S101 - `_begin` ran
    return _job(items)
