"""Runs programs that a model wrote in a sandbox of Linux namespaces and limits, which `sandboxed.py` builds.

A program in the sandbox has:

- no network interface;
- the Python interpreter's folder and the system's libraries, read only, and an empty /tmp in memory;
- a process namespace of its own, so that it cannot signal other processes, and no right to start processes or threads;
- limits on processor time, memory, open files and bytes written, and an end after `timeout_s`;
- an empty environment and no capability. Its user is nobody if root runs it, else the user that runs it.

The sandbox does not protect against three things. The program can use every system call (there is no seccomp filter),
so a hole in the kernel opens the sandbox. It can use one processor core and `memory_bytes` until its end. And a program
that looks for the test harness in its own process can make a failed test look passed. If the authors of programs may be
hostile, run all of mixfuse in a virtual machine. If a part of the sandbox cannot be built, the program is not run.
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
    """The limits of one program.

    Attributes:
        timeout_s: The program is killed after this many seconds.
        cpu_s: The most processor time, in seconds.
        memory_bytes: The most address space.
        file_bytes: The largest size of one file, and of all files in /tmp together.
        files: The most open files at once.
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
        ended: `passed`: it ran to its end; `failed`: it raised or exited before its end; `timeout`; `killed`: by a
            limit.
        output: The last 2000 bytes that it wrote to standard output and standard error.
    """

    ended: Literal["passed", "failed", "timeout", "killed"]
    output: str

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.ended == "passed"


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a Python program (standard library only) in the sandbox.

    Args:
        program: Its source.
        limits: Its limits.

    Raises:
        MixfuseError: The sandbox cannot be built here (kind "sandbox"); the program was not run.
    """
    if sys.platform != "linux":
        raise MixfuseError("programs run on Linux only: the sandbox needs Linux namespaces", kind="sandbox")
    limits = limits or Limits()
    end_token = secrets.token_hex(16)  # the report ends with it only if the program ran to its end
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
            "end_token": end_token,
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
            reported = report.read(len(sandboxed.BUILT) + len(end_token)).decode(errors="replace")
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - _TAIL))
        tail = output.read().decode(errors="replace").strip()
    if timed_out:
        return Outcome("timeout", tail)
    if not reported:
        raise MixfuseError(
            f"the sandbox for programs cannot be built here ({tail}); allow user namespaces, or run as root of a "
            "container with CAP_SYS_ADMIN",
            kind="sandbox",
        )
    if reported == sandboxed.BUILT + end_token and process.returncode == 0:
        return Outcome("passed", tail)
    return Outcome("killed" if process.returncode > 128 else "failed", tail)
