"""Other gateways that fuse, installed from their packages and started on free ports, for `fusion.py --peers`.

- TensorZero (Rust): `best_of_n` and `mixture_of_n`, and the latter with a time-out of 2 s; its Python package carries
  the gateway.
- optillm (Python): `bon` and `moa`.
- Portkey (Node): no fusion; the benchmark makes the four calls through it. Only where npm is at hand.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import MEMBERS, BenchmarkError, note, process

TENSORZERO, OPTILLM, PORTKEY = "tensorzero==2026.6.0", "optillm==0.4.0", "@portkey-ai/gateway@1.15.2"

# The package starts its gateway on a free port of its own when it patches a client of OpenAI's; any object will do.
_TENSORZERO_SERVER = """
import sys, threading, types, tensorzero
client = types.SimpleNamespace(base_url=None, api_key="unused")
tensorzero.patch_openai_client(client, config_file=sys.argv[1], async_setup=False)
print("ready:", str(client.base_url).rstrip("/"), file=sys.stderr, flush=True)
threading.Event().wait()
"""


@contextmanager
def peers(folder: Path, upstream: str) -> Iterator[list[str]]:
    """Installs what is missing in `folder` and runs the peers; yields their `--target` specifications."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        python = _environment(folder / "tensorzero", TENSORZERO)
        config = folder / "tensorzero.toml"
        config.write_text(_tensorzero(upstream), encoding="utf-8")
        command = [str(python), "-c", _TENSORZERO_SERVER, str(config)]
        url, _ = stack.enter_context(process(command, folder / "tensorzero.log", MOCK_KEY="unused"))
        tensorzero = f"{url};model=tensorzero::function_name::"
        specs = [
            f"TensorZero best_of_n={tensorzero}best",
            f"TensorZero mixture_of_n={tensorzero}mixture",
            f"TensorZero mixture_of_n, 2 s={tensorzero}mixture_timeout",
        ]
        python = _environment(folder / "optillm", OPTILLM)
        command = [str(python.with_name("optillm")), "--base-url", upstream, "--model", "pool", "--log", "warning"]
        url = stack.enter_context(_serving(command, folder / "optillm.log", OPENAI_API_KEY="unused"))
        specs += [f"optillm bon={url}/v1;model=bon-pool", f"optillm moa={url}/v1;model=moa-pool"]
        if npm := shutil.which("npm"):
            server = folder / "node_modules/@portkey-ai/gateway/build/start-server.js"
            if not server.exists():
                note(f"installing {PORTKEY}")
                subprocess.run([npm, "install", "--silent", "--prefix", str(folder), PORTKEY], check=True)
            url = stack.enter_context(_serving(["node", str(server), "--headless"], folder / "portkey.log"))
            headers = f";h.x-portkey-provider=openai;h.x-portkey-custom-host={upstream};h.authorization=Bearer unused"
            specs.append(f"Portkey, call by call={url}/v1{headers}")
        yield specs


def _environment(folder: Path, package: str) -> Path:
    """A virtual environment with that package; its interpreter."""
    python, done = folder / "bin/python", folder / "installed.json"
    if not done.exists() or json.loads(done.read_text()) != package:
        note(f"installing {package}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
        done.write_text(json.dumps(package))
    return python


@contextmanager
def _serving(command: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """Runs a server that takes `--port`; yields its URL once it answers anything.

    Raises:
        BenchmarkError: It did not within a minute.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    named = f"--port={port}"  # optillm and Portkey both read this form
    with log.open("wb") as out:
        running = subprocess.Popen([*command, named], stdout=out, stderr=out, env={**os.environ, **environment})
        try:
            end = time.monotonic() + 60
            while not _answers(url):
                if running.poll() is not None or time.monotonic() > end:
                    raise BenchmarkError(f"{command[0]} did not start: {log.read_text(errors='replace')[-1000:]}")
                time.sleep(0.2)
            yield url
        finally:
            running.terminate()
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _tensorzero(upstream: str) -> str:
    """Its config: the mock's models, and functions that fuse the three members."""
    lines = ["[gateway]", "observability.enabled = false"]
    for model in (*MEMBERS, "judge", "synth"):
        lines += [
            f"[models.{model}]",
            'routing = ["mock"]',
            f"[models.{model}.providers.mock]",
            f'type = "openai"\nmodel_name = "{model}"\napi_base = "{upstream}/"\napi_key_location = "env::MOCK_KEY"',
        ]
    kinds = {
        "best": ("experimental_best_of_n_sampling", "evaluator", "judge"),
        "mixture": ("experimental_mixture_of_n", "fuser", "synth"),
        "mixture_timeout": ("experimental_mixture_of_n", "fuser", "synth"),
    }
    for function, (kind, part, model) in kinds.items():
        lines += [f"[functions.{function}]", 'type = "chat"']
        for member in MEMBERS:
            lines += [f"[functions.{function}.variants.{member}]", f'type = "chat_completion"\nmodel = "{member}"']
            if function.endswith("timeout"):
                lines.append("timeouts = { non_streaming.total_ms = 2000, streaming.ttft_ms = 2000 }")
        lines += [
            f"[functions.{function}.variants.fused]",
            f'type = "{kind}"\ncandidates = {json.dumps(MEMBERS)}',
            f"[functions.{function}.variants.fused.{part}]",
            f'model = "{model}"',
            *(['json_mode = "strict"'] if part == "evaluator" else []),
            f"[functions.{function}.experimentation]",
            'type = "uniform"\ncandidate_variants = ["fused"]',
        ]
    return "\n".join(lines) + "\n"
