"""The vLLM engine as a child process.

One engine serves one base model, and adapters that are loaded and unloaded while it runs. This module starts it, says
in one line why it did not start, and leaves no process behind, however this process ends. `serve/vllm_api.py` is its
client; `serve/supervisor.py` restarts it. None of them knows which adapter serves which role.
"""

import asyncio
import contextlib
import inspect
import os
import re
import secrets
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mixfuse.contracts.adapter import LORA_TARGETS, LoraRank
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.serve.vllm_api import TOP_LOGPROBS, VllmApi, engine_error

BASE_MODEL_NAME = "base"
_STOP_GRACE_S = 15.0
# An error line in the log says more than the last line of a traceback through three processes.
_ERROR_LINE = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)): (.+)")
_EMPTY_ERROR = re.compile(r"See (?:root cause|stack trace)|Engine core initialization failed|EngineDeadError")


class Restart(Strict):
    """When an engine counts as dead or hung, how it is restarted, and when the supervisor gives up.

    Attributes:
        first_delay_s: Pause before the first restart, in seconds. Each further crash doubles it. A random part, up to
            a half, is taken off, so that engines that crashed together do not restart together.
        max_delay_s: The longest pause, in seconds.
        crashes: The engine is given up after this many crashes within `window_s`.
        window_s: How long a crash counts, in seconds.
        check_s: Seconds between two checks of the engine; each asks it for one token.
        hung_after_s: An engine that has answered no check for this many seconds, and has taken no step, is restarted.
        wait_s: The longest a request waits for an engine that is away, in seconds. Pool members also keep their own
            deadline.
    """

    first_delay_s: float = Field(default=1, ge=0)
    max_delay_s: float = Field(default=60, ge=0)
    crashes: int = Field(default=5, ge=1)
    window_s: float = Field(default=900, gt=0)
    check_s: float = Field(default=5, gt=0)
    hung_after_s: float = Field(default=60, gt=0)
    wait_s: float = Field(default=60, ge=0)


class EngineConfig(Strict):
    """What the engine serves, and how. With `url` or `urls` it is an external engine, which someone else runs.

    For an external engine `base`, `max_lora_rank` and `dtype` must say how it was started; the other start options are
    ignored. It must read adapters at the same paths as this host, allow run-time loading
    (`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`), and serve only one gateway.

    Attributes:
        base: The folder of the base model: weights, `config.json` and tokenizer.
        weights: A quantised copy of `base` to serve instead. The tokenizer is read from `base`, and adapters are
            checked against `base`; nothing checks that the copy was made from it.
        dtype: The type of weights and activations, unless they are quantised.
        max_model_len: The longest prompt and completion together, in tokens.
        max_lora_rank: The highest rank of an adapter; vLLM accepts only these values.
        max_loras: How many adapters may be active in one batch. More can be loaded; they take turns.
        max_loaded: How many adapters stay loaded; beyond that, the least recently used one makes room. By default all
            stay loaded.
        host: The address to listen on, a loopback one: vLLM's API key guards `/v1`, but not `/adapters` and
            `/invocations` (vllm/entrypoints/serve/middleware/authenticate.py).
        port: The port to listen on; a free one by default.
        max_num_seqs: How many requests run at once.
        kv_cache_gib: On a CPU, the size of the KV cache, in GiB.
        threads: On a CPU, the number of computing threads; all cores by default.
        start_timeout_s: The longest the start may take, in seconds.
        extra_args: Further arguments for vLLM's API server, e.g. `--tensor-parallel-size=8`.
        env: Further environment variables for it.
        replicas: How many engines of this kind to start. Each gets its own GPUs, in the order of
            `CUDA_VISIBLE_DEVICES`.
        url: An external engine, e.g. `http://10.0.0.5:8000`.
        urls: Several external engines, all with the same base model.
        api_key_env: The environment variable with the API key of the external engines.
        restart: What to do when an engine crashes, hangs, or is away.
    """

    base: Path
    weights: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = Field(default=1024, ge=2)
    max_lora_rank: LoraRank = 16
    max_loras: int = Field(default=4, ge=1)
    max_loaded: int | None = Field(default=None, ge=1)
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=1, le=65535)
    max_num_seqs: int = Field(default=32, ge=1)
    kv_cache_gib: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    start_timeout_s: float = Field(default=300, gt=0)
    extra_args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    replicas: int = Field(default=1, ge=1)
    url: str | None = None
    urls: list[str] = Field(default_factory=list)
    api_key_env: str | None = None
    restart: Restart = Restart()

    @property
    def external(self) -> list[str]:
        """The base URLs of the external engines; empty if this config starts its own."""
        return [_api_url(url) for url in ([self.url] if self.url else self.urls)]

    @field_validator("url", "urls")
    @classmethod
    def _http(cls, value: str | list[str] | None) -> str | list[str] | None:
        for url in [value] if isinstance(value, str) else value or []:
            if not re.match(r"https?://[^/\s]+", url):
                raise ValueError(f"{url!r} is not a URL; write http://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _check_own_or_external(self) -> Self:
        if self.url and self.urls:
            raise ValueError("give `url` or `urls`, not both")
        if len(set(self.external)) != len(self.external):
            raise ValueError("`urls` names one engine twice")
        if self.external and self.replicas > 1:
            raise ValueError("`replicas` counts engines that are started here; list external ones in `urls`")
        if self.api_key_env and not self.external:
            raise ValueError("`api_key_env` is for an external engine (`url`); an own engine makes its own key")
        if self.port and self.replicas > 1:
            raise ValueError("several replicas cannot share one port; leave `port` out")
        return self

    @field_validator("host")
    @classmethod
    def _loopback(cls, host: str) -> str:
        if host != "localhost" and not host.startswith("127."):
            raise ValueError("the engine listens on a loopback address only; put the gateway before it")
        return host


class Engine(VllmApi):
    """A vLLM engine as a child process; an async context manager around `start` and `stop`.

    Attributes:
        config: The engine's config.
        api_key: A secret made for this engine; every call to `url` carries it as a bearer token.
        log_path: The engine's log. The log of the previous start is kept beside it, as `….1`.
    """

    def __init__(self, config: EngineConfig, *, log_path: Path) -> None:
        self.config = config
        self.log_path = Path(log_path)
        key = secrets.token_urlsafe(32)
        super().__init__(None, key, base_model_name=BASE_MODEL_NAME, hint=f"see {self.log_path}")
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def running(self) -> bool:
        """Whether the engine's process is alive."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the engine and returns when it answers.

        Raises:
            MixfuseError: vLLM is not installed, the base model is missing, the port is in use, the engine died (with
                the error from its log) or took too long. Nothing is left running.
        """
        if self.running:
            raise RuntimeError("the engine is running already")
        if find_spec("vllm") is None:
            raise engine_error("vLLM is not installed; run scripts/setup, or pip install 'mixfuse[serve-cpu]'")
        for folder in (self.config.base, self.config.weights or self.config.base):
            if not (folder / "config.json").is_file():
                raise engine_error(f"{folder} holds no base model (no config.json)")
        port = _checked_port(self.config.host, self.config.port)
        self._url = f"http://{self.config.host}:{port}/v1"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists():
            self.log_path.replace(f"{self.log_path}.1")  # it may say why the engine was restarted
        with self.log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _GUARD, str(_STOP_GRACE_S)),
                *command(self.config, port),
                stdin=asyncio.subprocess.PIPE,  # never written to; it closes when this process ends
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    **environment(self.config),
                    "VLLM_API_KEY": str(self.api_key),  # not an argument: every user of the machine can read those
                },
                start_new_session=True,  # Ctrl-C must reach only this process
            )
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                await self._until_healthy()
        except TimeoutError:
            await self.stop()
            raise engine_error(
                f"the engine did not answer within {self.config.start_timeout_s:g} s; see {self.log_path}"
            ) from None
        except BaseException:  # cancelled, too
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops the engine and all its processes; does nothing if it does not run."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()  # the guard then ends the engine
        try:
            async with asyncio.timeout(_STOP_GRACE_S + 10):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def wait(self) -> int:
        """Waits for the engine's end and returns its exit status (128 + n: killed by signal n)."""
        if self._process is None:
            raise RuntimeError("the engine has not been started")
        return await self._process.wait()

    async def _until_healthy(self) -> None:
        while self.running:
            if await self.healthy(timeout_s=5):
                return
            await asyncio.sleep(0.25)
        raise engine_error(f"the engine died at its start: {last_error(self.log_path)}; see {self.log_path}")


def environment(config: EngineConfig, *, cpu: bool | None = None) -> dict[str, str]:
    """The environment variables that an engine gets beyond those of this process, without its API key.

    Args:
        config: The engine's config.
        cpu: Whether it runs on a CPU; None: as the installed vLLM does.
    """
    on_cpu = {
        # Threads are not pinned to cores: other engines and trainings share them.
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.threads or len(os.sched_getaffinity(0))),
        # vLLM compiles some helpers also under --enforce-eager: without a C++ compiler, a request for a prompt's
        # log-probabilities then kills the engine.
        "TORCH_COMPILE_DISABLE": "1",
    }
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        # Its clients close idle connections first (`fusion/calls/upstream.py`), so that no request meets a closed one.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "HF_HUB_OFFLINE": "1",
        **(on_cpu if _on_cpu(cpu) else {}),
        **config.env,
    }


def command(config: EngineConfig, port: int, *, cpu: bool | None = None) -> list[str]:
    """The API server's command line. `vllm serve` is not used: it needs a distribution that vllm-cpu does not have.

    Args:
        config: The engine's config.
        port: The port it listens on.
        cpu: Whether it runs on a CPU; None: as the installed vLLM does.
    """
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(config.weights or config.base), "--served-model-name", BASE_MODEL_NAME),
        *(["--tokenizer", str(config.base)] if config.weights else []),
        *("--host", config.host, "--port", str(port)),
        *("--dtype", config.dtype, "--max-model-len", str(config.max_model_len)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--enable-lora", "--max-lora-rank", str(config.max_lora_rank)),
        *("--max-loras", str(config.max_loras), "--lora-target-modules", *LORA_TARGETS),
        # By default vLLM keeps only `max_loras` adapters in memory, and reads the others again unverified when needed.
        *(["--max-cpu-loras", str(max(config.max_loras, config.max_loaded + 1))] if config.max_loaded else []),
        *("--max-logprobs", str(TOP_LOGPROBS)),
        *("--generation-config", "vllm"),  # the model's own would change the sampling of requests
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        # On a CPU, compiling takes longer than it saves. The cache's default block of 128 tokens is longer than short
        # prompts, which then share no prefix; 32 is the smallest block that the CPU attention accepts.
        *(["--enforce-eager", "--block-size", "32"] if _on_cpu(cpu) else []),
        *config.extra_args,
    ]


def _on_cpu(cpu: bool | None) -> bool:
    return cpu_build() if cpu is None else cpu


def cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _checked_port(host: str, port: int | None) -> int:
    """Returns `port`, or a free one.

    Raises:
        MixfuseError: The port is in use, or the address is not of this machine.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
        try:
            listener.bind((host, port or 0))
        except OSError as error:
            raise engine_error(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from None
        bound: int = listener.getsockname()[1]
        return bound


def _api_url(url: str) -> str:
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def last_error(log_path: Path) -> str:
    """Returns the most informative error line of an engine's log."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number in range(len(lines) - 1, -1, -1):
        match = _ERROR_LINE.search(lines[number])
        if not match or _EMPTY_ERROR.search(match[0]):
            continue
        kind, message = match[1].rpartition(".")[2], match[2]
        if "validation error" in message and number + 1 < len(lines):  # pydantic's reason is on the next line
            message = lines[number + 1].partition(" [type=")[0].strip()
        return f"{kind}: {message}"[:500]
    return next((line for line in reversed(lines) if line.strip()), "it left no message")[:500]


def _guard() -> None:
    """Runs a command; ends all its processes when it ends, when a signal arrives, or when the guard's parent is gone.

    The guard runs as a program of its own, from this source, so that it starts at once and imports nothing of mixfuse.
    vLLM is three processes deep, and a child does not always notice that its parent was killed. The guard's parent
    holds the write end of its stdin, which the kernel closes however the parent ends, SIGKILL included. As a subreaper
    the guard inherits every orphan below it, so it knows when all of them are gone.
    """
    import ctypes
    import os
    import select
    import signal
    import subprocess
    import sys
    import time

    set_pdeathsig, set_child_subreaper = 1, 36  # linux/prctl.h
    libc = ctypes.CDLL(None)
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    server = subprocess.Popen(
        sys.argv[2:],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(set_pdeathsig, signal.SIGTERM),  # noqa: PLW1509 - one thread
    )
    status: int | None = None

    def any_left() -> bool:
        nonlocal status
        while True:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == server.pid:
                code = os.waitstatus_to_exitcode(raw)
                status = code if code >= 0 else 128 - code

    while any_left() and status is None and not signals and not select.select([0], [], [], 0.2)[0]:
        pass
    grace = float(sys.argv[1]) if status is None else 3.0  # report a crash soon
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + seconds
        while any_left() and time.monotonic() < deadline:
            time.sleep(0.05)
    any_left()
    sys.exit(status)


_GUARD = f"{inspect.getsource(_guard)}\n_guard()"
