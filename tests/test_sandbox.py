"""Programs that a model wrote, run where they can do little harm."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mixfuse.contracts.errors import MixfuseError
from mixfuse.sandbox import runner
from mixfuse.sandbox.runner import Limits, Outcome

SHORT = Limits(timeout_s=20, cpu_s=1)


def run(program: str, limits: Limits = SHORT) -> Outcome:
    try:
        return runner.run(program, limits)
    except MixfuseError as error:
        if error.kind == "sandbox":
            pytest.skip(str(error))
        raise


def test_a_program_that_comes_to_its_end_has_passed() -> None:
    assert run("import json, hashlib, math\nprint('well')") == Outcome("passed", "well")


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", ""),
        ("import os; os._exit(97)", ""),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_one_that_ends_otherwise_has_failed(program: str, output: str) -> None:
    outcome = run(program)
    assert outcome.ended == "failed"
    assert output in outcome.output


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            pass  # from here it can be reached
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
    assert outcome.ended == "failed"
    assert "unreachable" in outcome.output


def test_it_sees_no_file_but_the_libraries_and_writes_only_in_its_own_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    secret.chmod(0o666)
    for path in (secret, "/etc/passwd", "/proc/1/environ"):
        assert "No such file" in run(f"print(open({str(path)!r}).read())").output
    # Which of the two depends on who owns the file: the owner is checked before the mount.
    assert re.search("Permission denied|Read-only", run("import os; open(os.__file__, 'a')").output)
    assert run("open('notes', 'w').write('x'); assert open('/tmp/notes').read() == 'x'").passed
    assert run("import os; assert os.listdir('/tmp') == []").passed, "what another program wrote is still there"


def test_it_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert run("import os; assert 'SECRET_KEY' not in os.environ").passed


def test_it_cannot_be_or_become_root() -> None:
    assert run("import os; assert 0 not in (os.getuid(), os.geteuid(), os.getgid(), os.getegid())").passed
    assert "not permitted" in run("import os; os.setuid(0)").output
    assert "not permitted" in run("import os; os.chroot('/tmp')").output


def test_it_starts_nothing_and_signals_nobody() -> None:
    for program in ("import os; os.fork()", "import subprocess; subprocess.run(['/bin/true'])"):
        assert run(program).ended == "failed"
    assert "thread" in run("import threading; threading.Thread(target=print).start()").output
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert "No such process" in run(f"import os; os.kill({bystander.pid}, 9)").output
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")


def test_limits_hold() -> None:
    assert run("while True: pass").ended == "killed"
    assert "MemoryError" in run("x = bytearray(1 << 30)").output
    assert run("open('big', 'wb').write(bytes(64 << 20))").ended == "failed"
    assert "Too many open files" in run("files = [open(str(n), 'w') for n in range(99)]").output
    # In many small files, too: its folder is no larger than one file may be.
    many = "for n in range(20): open(f'{n}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(many, Limits(file_bytes=8 << 20)).output


def children() -> Iterator[str]:
    for child in psutil.Process().children(recursive=True):
        yield " ".join(child.cmdline())


def test_one_that_waits_for_ever_is_ended_and_leaves_no_process() -> None:
    outcome = run("import time; print('waits', flush=True); time.sleep(600)", Limits(timeout_s=1))
    assert outcome == Outcome("timeout", "waits")
    assert not [line for line in children() if "sandboxed.py" in line]


def test_where_a_wall_cannot_be_built_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: on a machine where new namespaces are refused, which is told by the script that asks for them."""
    script = Path(runner.sandboxed.__file__).read_text().replace("_libc.unshare(spaces)", "_libc.unshare(-1)")
    refused = tmp_path / "sandboxed.py"
    refused.write_text(script)
    monkeypatch.setattr(runner.sandboxed, "__file__", str(refused))
    with pytest.raises(MixfuseError, match=r"new namespaces: Invalid argument.*allow user namespaces") as error:
        runner.run("open('/tmp/ran', 'w')")
    assert error.value.kind == "sandbox"
