"""Renders a chat template under limits of time and memory, in a process of its own: a program for `chat_template.py`.

Jinja's sandbox keeps a template from the machine, not from its time and memory: `{% for %}` over `range` in itself,
`'x' * 10**9`, `'%999999999d' | format(1)` and a doubled text are all allowed. Nothing inside the process can stop work
that is done in C, so the whole process is limited, and killed.

Reads one JSON object on standard input (`template`, `chats`, `most`) and writes what is wrong as JSON, or null.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROCESSOR_S = 2.0
"""Processor time for all chats. A long template in use takes a tenth of a second, most of it for compiling; on a
processor that other work shares, several times that."""
MEMORY_BYTES = 48 << 20
"""Address space beyond what the interpreter has when it begins."""
_TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}


def environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers and vLLM render chat templates, without the tag `generation`."""

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = lambda value, **keys: json.dumps(value, ensure_ascii=False, **keys)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return made


def _limit() -> None:
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)  # SIGPROF kills, also amid work in C
    status = Path("/proc/self/statm")
    if status.is_file():
        pages = int(status.read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _problem(task: dict[str, Any]) -> str | None:
    try:
        compiled = environment().from_string(task["template"])  # computes what is constant: a part of the trial
    except MemoryError:
        return "memory"
    except Exception:  # a template that is none is refused elsewhere
        return None
    for chat in task["chats"]:
        written = 0
        try:
            for part in compiled.generate(**_TOKENS, **chat):
                written += len(part)
                if written > task["most"]:
                    return "size"
        except MemoryError:
            return "memory"
        except Exception:  # noqa: S112 - a chat may be refused
            continue
    return None


if __name__ == "__main__":
    given = json.load(sys.stdin)
    _limit()
    print(json.dumps(_problem(given)))
