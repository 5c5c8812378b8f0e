"""Programs that a model wrote, run where they can do little harm.

What holds them (Linux, by namespaces and limits; `sandboxed.py` builds it): a network without any interface, a
file system that is the Python interpreter's folder and the system's libraries, read only, and an empty /tmp in memory;
process numbers of their own, so that no other process can be signalled; no further process or thread; limits on
processor time, memory, open files and bytes written; an end after `timeout_s` in any case; an empty environment. The
user is nobody where root runs it, else whoever runs it, without any capability.

What does not: a hole in the kernel, whose whole interface of system calls stays open (there is no seccomp filter); what
one processor core and `memory_bytes` can do in that time; and a program that looks for the test harness in its own
process can make a failed test look passed. For programs of people who mean harm, run all of mixfuse in a virtual
machine. Where a wall cannot be built nothing is run.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixfuse.contracts.errors import MixfuseError
from mixfuse.sandbox import sandboxed

_TAIL = 2000


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        timeout_s: Seconds until it is ended, whatever it does.
        cpu_s: Seconds of processor time.
        memory_bytes: Address space.
        file_bytes: Of one file, and of all that is in its /tmp.
        files: Open at once.
    """

    timeout_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    files: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended: `passed`: it came to its end; `failed`: an exception or an exit before its end; `timeout`; `killed`: by a
            limit.
        said: The end of what it wrote.
    """

    ended: Literal["passed", "failed", "timeout", "killed"]
    said: str

    @property
    def passed(self) -> bool:
        """Whether it came to its end."""
        return self.ended == "passed"


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a Python program (standard library only) in the sandbox.

    Args:
        program: Its source.
        limits: What it may use.

    Raises:
        MixfuseError: The sandbox cannot be built here (kind "sandbox"); the program was not run.
    """
    if sys.platform != "linux":
        raise MixfuseError("programs are only run on Linux: the sandbox is made of its namespaces", kind="sandbox")
    limits = limits or Limits()
    word = secrets.token_hex(16)
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="mixfuse-sandbox-") as root, tempfile.TemporaryFile() as output:
        job = {
            "program": program,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "files": limits.files,
            "root": root,
            "report": writer,
            "word": word,
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(Path(sandboxed.__file__))],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                env={},
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            process.communicate(json.dumps(job).encode(), timeout=limits.timeout_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            process.kill()  # the program's process ends with this one
            process.communicate()
            timed_out = True
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        with os.fdopen(reader, "rb") as report:
            reported = report.read(len(sandboxed.WALLED) + len(word)).decode(errors="replace")
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - _TAIL))
        said = output.read().decode(errors="replace").strip()
    if timed_out:
        return Outcome("timeout", said)
    if not reported:
        raise MixfuseError(
            f"the sandbox for programs cannot be built here ({said}); allow user namespaces, or run as root of a "
            "container with CAP_SYS_ADMIN",
            kind="sandbox",
        )
    if reported == sandboxed.WALLED + word and process.returncode == 0:
        return Outcome("passed", said)
    return Outcome("killed" if process.returncode > 128 else "failed", said)
