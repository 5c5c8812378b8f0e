"""Builds the sandbox and runs one Python program in it: the script that `mixfuse.sandbox.runner` starts.

`runner` starts it with `python -I -S`, so it imports only the standard library. It reads one JSON object from standard
input: `program`, `cpu_s`, `memory_bytes`, `file_bytes`, `files`, `root` (an empty folder), `report` (a file descriptor)
and `end_token`. It builds the sandbox, writes `BUILT` to `report`, runs the program, and writes `end_token` to `report`
if the program ran to its end. If the sandbox cannot be built, it neither runs the program nor writes to `report`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

BUILT = "built "
_NOBODY = 65534
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")

_HOME = "/tmp"  # noqa: S108 - a private one

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Creates the namespaces, then forks; the child gives up its rights and runs the program."""
    job = json.loads(sys.stdin.buffer.read())
    try:
        user, group = os.geteuid(), os.getegid()
        # Root needs no user namespace and becomes nobody. Another user gets the right to mount from a user namespace.
        spaces = _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK | (_NEW_USER if user else 0)
        _checked("new namespaces", _libc.unshare(spaces))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        child = os.fork()
        if not child:
            _confine(job, user)
    except OSError as error:
        _refuse(error)
    if not child:
        _run(job)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


def _confine(job: dict[str, object], user: int) -> None:
    """Changes to a root with only the interpreter and the libraries, gives up all rights, and sets the limits."""
    root = str(job["root"])
    _checked("private mounts", _libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    size = f"size={job['file_bytes']},mode=0755".encode()
    _checked("a root of its own", _libc.mount(b"tmpfs", root.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, size))
    for path in (os.path.realpath(sys.base_prefix), *_LIBRARIES):
        target = Path(root + path)
        if os.path.islink(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(path))
        elif os.path.isdir(path) and not target.exists():
            target.mkdir(parents=True)
            _checked(path, _libc.mount(path.encode(), str(target).encode(), None, _BIND | _RECURSIVE, None))
            flags = _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES
            _checked(f"{path} read only", _libc.mount(b"none", str(target).encode(), None, flags, None))
    os.chroot(root)
    os.mkdir(_HOME)
    os.chmod(_HOME, 0o777)  # noqa: S103 - only this program sees this root
    os.chdir(_HOME)
    if user == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    _give_up_rights()
    for limit, value in (
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_NOFILE, job["files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (int(str(value)), int(str(value))))


def _give_up_rights() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked("no rights", _libc.capset(header, (ctypes.c_uint32 * 6)()))
    _checked("no new rights", _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked("an end with its parent", _libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))


def _run(job: dict[str, object]) -> None:
    """Runs the program; never returns."""
    code = 1
    os.write(int(str(job["report"])), BUILT.encode())
    try:
        exec(compile(str(job["program"]), "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102 - its purpose
        os.write(int(str(job["report"])), str(job["end_token"]).encode())
        code = 0
    except BaseException as error:  # a program may raise anything
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _checked(step: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")


def _refuse(error: OSError) -> None:
    print(error.strerror, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
