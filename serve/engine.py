"""The vLLM engine as a supervised child process.

One engine serves one base model and, beside it, adapters that come and go while it runs. This module starts
it, says in one line why it would not start, loads and unloads adapters, and sees to it that no process is
left behind, however this one ends. It does not know which adapter plays which role.
"""

import asyncio
import contextlib
import inspect
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from pydantic import Field, field_validator

from mixfuse.errors import MixfuseError
from mixfuse.recipe import Strict

BASE_MODEL_NAME = "base"
TOP_LOGPROBS = 20  # what a judge's verdict is read from
# Everything an adapter may change. vLLM's default adds the router, which no recipe trains, and the output
# layer, with which the engine dies at the first batch where one of several requests asks for prompt
# log-probabilities (vLLM issue 16668).
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts")
_STOP_GRACE_S = 15.0
_SERVED_WEIGHT = re.compile(r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj|experts\.\d+\.w[123])\.lora_[AB]\.weight$")
# The first matches of these in the log say more than the last line of a traceback through three processes.
_ERROR_LINE = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)): (.+)")
_EMPTY_ERROR = re.compile(r"See (?:root cause|stack trace)|Engine core initialization failed|EngineDeadError")


LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The maximum ranks vLLM knows."""


class EngineConfig(Strict):
    """What the engine serves, and how.

    Attributes:
        base: The folder of the base model: weights, `config.json` and tokenizer.
        dtype: What weights and activations are held in.
        max_model_len: The longest prompt and completion together, in tokens.
        max_lora_rank: The highest rank an adapter may have; vLLM knows only these.
        max_loras: How many adapters may be active in one batch. More can be loaded; they then take turns.
        max_loaded: How many adapters are kept loaded; beyond that the least recently used makes room for one that is
            needed. All of them by default.
        host: The address to listen on, a loopback one: vLLM's API key guards `/v1`, but not `/adapters` and
            `/invocations` (vllm/entrypoints/serve/middleware/authenticate.py).
        port: The port to listen on; a free one by default.
        max_num_seqs: How many requests are worked on at once.
        kv_cache_gib: The size of the cache of keys and values, in GiB, where the platform is a CPU.
        threads: The number of computing threads where the platform is a CPU; all cores by default.
        start_timeout_s: How long the start may take.
        extra_args: Further arguments for vLLM's API server, e.g. `--tensor-parallel-size=8`.
        env: Further environment variables for it.
    """

    base: Path
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

    @field_validator("host")
    @classmethod
    def _loopback(cls, host: str) -> str:
        if host != "localhost" and not host.startswith("127."):
            raise ValueError("the engine listens on a loopback address only; put the gateway before it")
        return host


class Engine:
    """A running vLLM engine; an async context manager around `start` and `stop`.

    Attributes:
        config: What it was made with.
        base_model_name: The name under which the base model answers; adapters answer under their own.
        api_key: A secret of this process; every call to `url` has to carry it as a bearer token.
        log_path: Where the engine writes its log.
    """

    base_model_name = BASE_MODEL_NAME

    def __init__(self, config: EngineConfig, *, log_path: Path) -> None:
        self.config = config
        self.log_path = Path(log_path)
        self.api_key = secrets.token_urlsafe(32)
        self._port = config.port
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """The base URL of the OpenAI API, known once the engine has been started."""
        if self._port is None:
            raise RuntimeError("the engine has not been started")
        return f"http://{self.config.host}:{self._port}/v1"

    @property
    def running(self) -> bool:
        """Whether the engine's process lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the engine and returns when it answers.

        Raises:
            MixfuseError: vLLM is not installed, the base model is missing, the port is in use, the engine
                died (with the error from its log) or took too long. Nothing is left running.
        """
        if self.running:
            raise RuntimeError("the engine is running already")
        if find_spec("vllm") is None:
            raise _engine_error("vLLM is not installed; run scripts/setup, or pip install 'mixfuse[serve-cpu]'")
        if not (self.config.base / "config.json").is_file():
            raise _engine_error(f"{self.config.base} holds no base model (no config.json)")
        self._port = _checked_port(self.config.host, self.config.port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _GUARD, str(_STOP_GRACE_S)),
                *_command(self.config, self._port),
                stdin=asyncio.subprocess.PIPE,  # the guard's sign that we live; never written to
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for us to handle
            )
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                await self._until_healthy()
        except TimeoutError:
            await self.stop()
            raise _engine_error(
                f"the engine did not answer within {self.config.start_timeout_s:g} s; see {self.log_path}"
            ) from None
        except BaseException:  # cancelled, too
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops the engine and all its processes; does nothing where it does not run."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()  # the guard does the rest
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

    async def load_adapter(self, name: str, path: Path) -> None:
        """Loads an adapter, which then answers as model `name`.

        Args:
            name: Not loaded yet, and not the base model's.
            path: A PEFT adapter folder in the layout that vLLM reads.

        Raises:
            MixfuseError: The folder has weights that vLLM would leave out without a word, or vLLM refuses it.
        """
        if name == self.base_model_name:
            raise MixfuseError(f"{name!r} is the base model's name; give the adapter another", kind="adapter")
        folder = await asyncio.to_thread(_served_adapter, path)
        await self._adapter_call("load_lora_adapter", lora_name=name, lora_path=str(folder))

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter; requests that still use it are lost, so drain them first.

        Raises:
            MixfuseError: No adapter of that name is loaded.
        """
        await self._adapter_call("unload_lora_adapter", lora_name=name)

    async def probe(self, name: str) -> None:
        """Has a model answer one token, so that an adapter that cannot is found before it serves.

        Raises:
            MixfuseError: It does not answer.
        """
        await self._post("completions", {"model": name, "prompt": [0], "max_tokens": 1})

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        """Log-probabilities, in nats, of a prompt's tokens but the first, each given those before it.

        Args:
            name: The base model's name, or an adapter's.
            prompt: Token ids.

        Raises:
            MixfuseError: The engine does not answer.
        """
        body = {"model": name, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
        answer = await self._post("completions", body)
        positions = answer["choices"][0]["prompt_logprobs"][1:]  # the first position has none
        return [position[str(token)]["logprob"] for position, token in zip(positions, prompt[1:], strict=True)]

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """Token text → log-probability, in nats, of the likeliest first tokens of the answer to chat messages.

        Args:
            name: The base model's name, or an adapter's.
            messages: The conversation.

        Raises:
            MixfuseError: The engine does not answer.
        """
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        answer = await self._post("chat/completions", {"model": name, "messages": messages, **asked})
        found: dict[str, float] = {}
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            # SentencePiece's "A" and "▁A" both decode to "A".
            before = math.exp(found[one["token"]]) if one["token"] in found else 0.0
            found[one["token"]] = math.log(before + math.exp(one["logprob"])) if before else one["logprob"]
        return found

    async def _adapter_call(self, endpoint: str, **body: str) -> None:
        response = await self._send(endpoint, body)
        if response.is_error:
            raise MixfuseError(f"vLLM refused {endpoint} of {body['lora_name']!r}: {_reason(response)}", kind="adapter")

    async def _post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._send(endpoint, body)
        if response.is_error:
            raise _engine_error(f"vLLM refused {endpoint} of {body['model']!r}: {_reason(response)}")
        answer: dict[str, Any] = response.json()
        return answer

    async def _send(self, endpoint: str, body: Mapping[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        try:
            async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
                return await client.post(f"{self.url}/{endpoint}", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise _engine_error(f"the engine does not answer ({type(error).__name__}); see {self.log_path}") from None

    async def _until_healthy(self) -> None:
        url = self.url.removesuffix("/v1") + "/health"
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while self.running:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(url)).is_success:
                        return
                await asyncio.sleep(0.25)
        raise _engine_error(f"the engine died at its start: {_last_error(self.log_path)}; see {self.log_path}")

    def _environment(self) -> dict[str, str]:
        config = self.config
        threads = config.threads or len(os.sched_getaffinity(0))
        return {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # On a CPU: size of the cache, and no pinning to cores, which other engines and trainings share.
            "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            **config.env,
            "VLLM_API_KEY": self.api_key,  # not an argument: those are for every user to read
        }


def _command(config: EngineConfig, port: int) -> list[str]:
    """The API server's command line; `vllm serve` asks for a distribution that vllm-cpu does not have."""
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(config.base), "--served-model-name", BASE_MODEL_NAME),
        *("--host", config.host, "--port", str(port)),
        *("--dtype", config.dtype, "--max-model-len", str(config.max_model_len)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--enable-lora", "--max-lora-rank", str(config.max_lora_rank)),
        *("--max-loras", str(config.max_loras), "--lora-target-modules", *LORA_TARGETS),
        # vLLM itself keeps no more than `max_loras` in memory, and reads the others again at need: unverified by then.
        *(["--max-cpu-loras", str(max(config.max_loras, config.max_loaded + 1))] if config.max_loaded else []),
        *("--max-logprobs", str(TOP_LOGPROBS)),
        *("--generation-config", "vllm"),  # the model's own would change the sampling that a request asks for
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        # On a CPU compiling takes longer than it saves, and the cache's blocks are of 128 tokens, so that no two short
        # prompts would ever share one: 32 is the least its attention takes.
        *(["--enforce-eager", "--block-size", "32"] if _cpu_build() else []),
        *config.extra_args,
    ]


def _cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _engine_error(message: str) -> MixfuseError:
    return MixfuseError(message, kind="engine")


def _checked_port(host: str, port: int | None) -> int:
    """Returns `port`, or a free one.

    Raises:
        MixfuseError: The port, or the address, cannot be had.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise _engine_error(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from None
        found: int = probe.getsockname()[1]
        return found


def _served_adapter(folder: Path) -> Path:
    """Refuses weights that vLLM would load with "Success" and then not use; returns the absolute path.

    vLLM does so with experts in PEFT's fused layout (`check_unexpected_modules` in vllm/lora/lora_model.py
    lets them pass, and a Mixtral's layers never ask for them) and with modules outside of
    `--lora-target-modules`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder).resolve() / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="np") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise MixfuseError(f"cannot read {path}: {error}", kind="adapter") from None
    if unserved := [name for name in names if not _SERVED_WEIGHT.search(name)]:
        raise MixfuseError(
            f"{path}: vLLM would silently ignore {unserved[0]}; name experts as vLLM does (experts.0.w1, …) "
            f"and adapt no other modules than {', '.join(LORA_TARGETS)}",
            kind="adapter",
        )
    return path.parent


def _reason(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return " ".join(str(message).split())[:500]


def _last_error(log_path: Path) -> str:
    """The most telling error line of an engine's log."""
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
    """Runs a command and ends all its processes when it ends, or when the guard is told to or is orphaned.

    This runs as a program of its own, from its source, so that it starts at once and imports nothing of ours.
    vLLM is three processes deep, and those below do not always notice when one above is killed. The guard's
    parent holds the write end of its stdin, which the kernel closes however the parent ends, SIGKILL
    included. As a subreaper the guard inherits every orphan below it, so it knows when all of them are gone.
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
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
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

    while any_left() and status is None and not told and not select.select([0], [], [], 0.2)[0]:
        pass
    grace = float(sys.argv[1]) if status is None else 3.0  # a crash should be known soon
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
