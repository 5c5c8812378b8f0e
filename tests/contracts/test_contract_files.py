"""Files are written whole or not at all, and every bad line that is read is named."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mixfuse.contracts import files, strict_yaml
from mixfuse.contracts.errors import MixfuseError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_only_when_its_block_has_succeeded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with files.atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    with pytest.raises(RuntimeError, match="stop"), files.atomic_file(path) as temporary:
        temporary.write_text("other")
        raise RuntimeError("stop")
    assert path.read_text() == "half"
    assert names(path.parent) == {"file.txt"}


def test_rows_that_fail_halfway_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.write_jsonl(path, [{"é": 1}, {"b": 2}]) == 2
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        files.write_jsonl(path, ({"value": 1 / value} for value in (1, 0)))
    assert path.read_bytes() == before
    assert files.read_jsonl(path) == [{"é": 1}, {"b": 2}]
    assert names(tmp_path) == {"rows.jsonl"}


def test_a_file_does_not_take_the_place_of_a_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MixfuseError, match="no regular file"):
        files.write_text(pipe, "text")
    assert pipe.is_fifo()


def test_a_folder_appears_only_when_its_block_has_succeeded(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), files.atomic_directory(path) as temporary:
        (temporary / "part").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == set()
    with files.atomic_directory(path) as temporary:
        (temporary / "part").write_text("x")
        assert not path.exists()
    assert names(tmp_path) == {"out"}
    assert names(path) == {"part"}


def test_a_folder_that_stands_is_refused_or_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(MixfuseError, match="exists already"), files.atomic_directory(path):
        pytest.fail("the block ran")
    with pytest.raises(RuntimeError), files.atomic_directory(path, replace=True):
        raise RuntimeError
    assert names(path) == {"old"}
    with files.atomic_directory(path, replace=True) as temporary:
        (temporary / "new").touch()
    assert names(path) == {"new"}
    assert names(tmp_path) == {"out"}


def test_others_can_read_what_a_library_wrote_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with files.atomic_directory(tmp_path / "out") as temporary:
            os.close(os.open(temporary / "private", os.O_CREAT, 0o600))
        with files.atomic_file(tmp_path / "file") as file:
            file.touch()
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


class SafetensorsError(Exception):
    """As safetensors words a full disk: no OSError, the system's words in its text."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorsError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_output(error: Exception, tmp_path: Path) -> None:
    """tests/train fills a real file system; where that cannot be mounted, this is left."""
    path = tmp_path / "out"
    for atomic in (files.atomic_file, files.atomic_directory):
        with pytest.raises(MixfuseError, match=f"no disk space left to write {path}") as caught, atomic(path):
            raise error
        assert caught.value.kind == "disk"
        assert names(tmp_path) == set()


def test_a_real_write_error_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow: no room, as far as the writer can tell, and no disk has to be full."""
    script = (
        "import signal, sys; from pathlib import Path; from mixfuse.contracts.files import write_jsonl;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "write_jsonl(Path(sys.argv[1]), ({'n': n} for n in range(100000)))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-c", script, str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60, check=False)
    assert "File too large" in done.stderr
    assert names(tmp_path) == set()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MixfuseError, match=r"cannot write .*file/below/x: "):
        files.write_text(tmp_path / "file" / "below" / "x", "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', r"rows.jsonl:3: malformed JSON"),
        (b'{"a": 1}\n[1]\n', r"rows.jsonl:2: expected a JSON object, found list"),
        (b'{"a": 1}\n{"b": 1}\n', r"rows.jsonl:2: missing key 'a'"),
        (b'{"a": "\xff"}\n', r"rows.jsonl: not UTF-8 text"),
        (b"\n \n", r"rows.jsonl: the data set is empty"),
        (b"", r"rows.jsonl: the data set is empty"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(MixfuseError, match=message):
        files.read_jsonl(path, required=("a",))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for read in (files.read_json, files.read_jsonl):
        with pytest.raises(MixfuseError, match="nowhere: no such file"):
            read(tmp_path / "nowhere")
        with pytest.raises(MixfuseError, match=str(tmp_path)):
            read(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(MixfuseError, match=r"bad.json: not valid JSON"):
        files.read_json(tmp_path / "bad.json")


def test_a_digest_of_json_is_of_its_meaning() -> None:
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": [2], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": ' + "9" * 5000 + "}"])
def test_json_beyond_all_bounds_is_one_line(tmp_path: Path, text: str):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(MixfuseError, match=r"odd\.json: not valid JSON"):
        files.read_json(path)
    with pytest.raises(MixfuseError, match=r"odd\.json:1: malformed JSON"):
        list(files.iter_jsonl(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key 'a' stands twice"),
        ("a: {b: 1, b: 2}\n", "the key 'b' stands twice"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_yaml_that_means_two_things_or_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(MixfuseError, match=message):
        strict_yaml.read_mapping(path)


def test_yaml_may_begin_with_a_byte_order_mark_and_merge_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    assert strict_yaml.read_mapping(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
