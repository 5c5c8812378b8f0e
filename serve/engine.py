"""The vLLM engine as a child process.

One engine serves one base model, and adapters that are loaded and unloaded while it runs. This module starts it, says
in one line why it did not start, and leaves no process behind, however this process ends. `serve/vllm_api.py` is its
client; `serve/supervisor.py` restarts it. None of them knows which adapter serves which role.
"""

import asyncio
import contextlib
import inspect
import ipaddress
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mixfuse.contracts import chat_template
from mixfuse.contracts.adapter import LORA_TARGETS, LoraRank
from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.paths import FilePath
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.serve.vllm_api import TOP_LOGPROBS, VllmApi, engine_error
from mixfuse.serve.vllm_arguments import argument, refusal, spans_nodes
from mixfuse.serve.vllm_key import KEY, KEY_FILE

logger = logging.getLogger(__name__)

BASE_MODEL_NAME = "base"
MIDDLEWARE = "mixfuse.serve.vllm_key.EveryRouteNeedsTheKey"
"""What makes every route of vLLM's server need the key."""
_STOP_GRACE_S = 15.0
_GONE_S = 120.0
_LOOK_S = 0.1
_MARK = "MIXFUSE_ENGINE"
"""The environment variable by which an engine's processes are found, wherever their parents went."""
_GPU_REST_MIB = 1024  # other programs' use may have grown a little
FAMILY_TOOLS = "family"
"""The value of `tool_parser` that stands for the parser of the base's family."""
_SECRET = re.compile(r"(?:^|[-_])(?:key|token|secret|password|credentials)$|password$", re.IGNORECASE)
_OWN_VARIABLES = {
    KEY: "the engine's key is made at each start",
    KEY_FILE: "the engine's key is made at each start",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "adapters are always loaded at run time",
    "VLLM_HOST_IP": "use engine.node_ip",
    "VLLM_USE_RUST_FRONTEND": "that server does not run the check of the key",
}
# An error line in the log says more than the last line of a traceback through three processes.
_ERROR_LINE = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)): (.+)")
_EMPTY_ERROR = re.compile(r"See (?:root cause|stack trace)|Engine core initialization failed|EngineDeadError")


class Restart(Strict):
    """When an engine counts as dead or hung, how it is restarted, and when the supervisor gives up.

    Attributes:
        first_delay_s: Pause before the first restart, in seconds. Each further crash doubles it. A random part, up to
            a half, is taken off, so that engines that crashed together do not restart together.
        max_delay_s: The longest pause, in seconds.
        crashes: The engine is given up after this many crashes and failed starts in a row, however long each took.
        healthy_s: An engine that was ready for this many seconds has no crashes behind it any more.
        check_s: Seconds between two checks of the engine; each asks it for one token, and which adapters it has.
        hung_after_s: An engine that has answered no check for this many seconds, and has taken no step, is restarted.
            The time in which it loads an adapter does not count.
        load_timeout_s: The longest that the load of an adapter may take, in seconds.
        wait_s: The longest a request waits for an engine that is away, in seconds. Pool members also keep their own
            deadline.
    """

    first_delay_s: float = Field(default=1, ge=0)
    max_delay_s: float = Field(default=60, ge=0)
    crashes: int = Field(default=5, ge=1)
    healthy_s: float = Field(default=300, gt=0)
    check_s: float = Field(default=5, gt=0)
    hung_after_s: float = Field(default=60, gt=0)
    load_timeout_s: float = Field(default=600, gt=0)
    wait_s: float = Field(default=60, ge=0)


class EngineConfig(Strict):
    """What the engine serves, and how. With `url` or `urls` it is an external engine, which someone else runs.

    For an external engine `base`, `max_lora_rank` and `dtype` must say how it was started, and, if it is quantised, so
    must `weights` or `extra_args` (`--quantization`, `--kv-cache-dtype`); the other start options are ignored. It must
    read adapters at the same paths as this host, allow run-time loading (`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`).
    Several gateways may use it.

    Attributes:
        base: The folder of the base model: weights, `config.json` and tokenizer.
        weights: A quantised copy of `base` to serve instead. The tokenizer is read from `base`, and adapters are
            checked against `base`; nothing checks that the copy was made from it.
        chat_template: The name of one of the base's chat templates, or a Jinja file, as in the recipes of its adapters;
            by default the base's own. System text that it cannot carry begins the user's turn, as in training.
        dtype: The type of weights and activations, unless they are quantised. `auto` is float32 on a CPU. On GPUs it is
            the type of the base's files, or half of it where that is float32; vLLM's kernels for LoRA on GPUs take
            bfloat16 and float16 only, so float32 is refused there.
        max_model_len: The longest prompt and completion together, in tokens.
        max_lora_rank: The highest rank of an adapter; vLLM accepts only these values.
        max_loras: How many adapters may be active in one batch. More can be loaded; they take turns.
        max_loaded: How many adapters stay loaded; beyond that, the least recently used one makes room. By default all
            stay loaded.
        max_cpu_loras: How many adapters vLLM's cache in the host's memory holds. Those that were unloaded count, since
            vLLM only forgets their names; the cache drops the one that was used least recently, and would read it
            again during a request. By default twice what can be loaded at once (`max_loaded`, or one for each role),
            and one more.
        host: The address to listen on, a loopback one. Every route but `/health` needs a key that is made for each
            start of the server (`serve/vllm_key.py`); vLLM's own check leaves out `/adapters` and `/invocations`.
        port: The port to listen on; a free one by default.
        max_num_seqs: How many requests run at once.
        kv_cache_gib: On a CPU, the size of the KV cache, in GiB.
        threads: On a CPU, the number of computing threads; all cores by default.
        start_timeout_s: The longest the start may take, in seconds.
        tool_parser: Which of vLLM's parsers reads tool calls from the text, so that requests with tools are answered:
            its name, or `family` for the one of the base's family (Mixtral: mistral, Qwen3-MoE: hermes). By default
            vLLM refuses requests that let the model choose a tool.
        node_ip: With several nodes, the address of this host in the private network between them. vLLM's processes
            meet there, and send each other pickled messages.
        extra_args: Further arguments for vLLM's API server, e.g. `--tensor-parallel-size=8`.
        env: Further environment variables for it. It gets those of this process without the ones that are named like
            secrets (`…_KEY`, `…_TOKEN`, `…_SECRET`, `…PASSWORD`), since Ray copies all of them to every node.
        log_mib: At this size, in MiB, the engine's log is begun anew; three older ones are kept (`….1` to `….3`).
        log_stdout: Write what the engine logs to this server's standard output, too.
        replicas: How many engines of this kind to start. Each gets its own GPUs, in the order of
            `CUDA_VISIBLE_DEVICES`: tensor times pipeline times data parallel.
        url: An external engine, e.g. `http://10.0.0.5:8000`.
        urls: Several external engines, all with the same base model.
        api_key_env: The environment variable with the API key of the external engines.
        restart: What to do when an engine crashes, hangs, or is away.
    """

    base: FilePath
    weights: FilePath | None = None
    chat_template: str | None = Field(default=None, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(default=1024, ge=2)
    max_lora_rank: LoraRank = 16
    max_loras: int = Field(default=4, ge=1)
    max_loaded: int | None = Field(default=None, ge=1)
    max_cpu_loras: int | None = Field(default=None, ge=1)
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=1, le=65535)
    max_num_seqs: int = Field(default=32, ge=1)
    kv_cache_gib: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1, le=1 << 16)
    start_timeout_s: float = Field(default=300, gt=0)
    tool_parser: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    node_ip: str | None = None
    extra_args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    log_mib: float = Field(default=64, gt=0)
    log_stdout: bool = False
    replicas: int = Field(default=1, ge=1, le=1024)
    url: str | None = None
    urls: list[str] = Field(default_factory=list)
    api_key_env: str | None = None
    restart: Restart = Restart()

    def for_roles(self, roles: int) -> "EngineConfig":
        """This config with a cache in the host's memory that fits a number of roles, unless it names its size."""
        places = self.max_loaded or max(roles, 1)
        return self if self.max_cpu_loras else self.model_copy(update={"max_cpu_loras": self.cached(places)})

    def cached(self, places: int) -> int:
        """How many adapters vLLM caches where `places` may be loaded: the next of each, too, and one to make room."""
        return max(self.max_loras, 2 * places + 1)

    @property
    def cpu_loras(self) -> int:
        """How many adapters vLLM's cache in the host's memory holds."""
        return self.max_cpu_loras or self.cached(self.max_loaded or self.max_loras)

    def dtype_on(self, *, cpu: bool) -> str:
        """What `dtype` means on a device: a CPU's `auto` is float32, where adapters agree best with training."""
        return "float32" if self.dtype == "auto" and cpu else self.dtype

    @property
    def served_dtype(self) -> str:
        """What `dtype` means where the engine runs; `auto` if that is not known before it runs."""
        return self.dtype if self.external else self.dtype_on(cpu=cpu_build())

    @property
    def external(self) -> list[str]:
        """The base URLs of the external engines; empty if this config starts its own."""
        return [_api_url(url) for url in ([self.url] if self.url else self.urls)]

    @field_validator("url", "urls")
    @classmethod
    def _http(cls, value: str | list[str] | None) -> str | list[str] | None:
        for url in [value] if isinstance(value, str) else value or []:
            if not _is_url(url):
                raise ValueError(f"{shortened(repr(url), 200)} is not a URL; write http://HOST:PORT")
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
        if self.max_cpu_loras is not None and self.max_cpu_loras < max(self.max_loras, (self.max_loaded or 0) + 1):
            raise ValueError("`max_cpu_loras` must be at least `max_loras`, and more than `max_loaded`")
        if self.port and self.replicas > 1:
            raise ValueError("several replicas cannot share one port; leave `port` out")
        return self

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        several = spans_nodes(self.extra_args) and not self.external
        if several and self.node_ip is None:
            raise ValueError(
                "an engine on several nodes is not on loopback: its processes send each other pickled messages; set "
                "`node_ip` to this host's address in a private network that only the nodes reach"
            )
        if self.node_ip is not None and not several:
            raise ValueError("`node_ip` is for an engine on several nodes (--distributed-executor-backend=ray)")
        return self

    @field_validator("node_ip")
    @classmethod
    def _private(cls, address: str | None) -> str | None:
        try:
            parsed = ipaddress.ip_address(address) if address is not None else None
        except ValueError:
            raise ValueError(f"{address!r} is no IP address; write one of this host's, such as 10.0.0.1") from None
        if parsed is not None and (not parsed.is_private or parsed.is_loopback or parsed.is_unspecified):
            raise ValueError(
                f"{address} is no address of a private network; vLLM's messages between nodes must not be public"
            )
        return address

    @field_validator("env")
    @classmethod
    def _free_variables(cls, env: dict[str, str]) -> dict[str, str]:
        for name, reason in _OWN_VARIABLES.items():
            if name in env:
                raise ValueError(f"{name}: {reason}; leave it out")
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"{shortened(repr(name), 80)} and its value cannot be an environment variable")
        return env

    @field_validator("extra_args")
    @classmethod
    def _served_arguments(cls, arguments: list[str]) -> list[str]:
        if any("\0" in argument for argument in arguments):
            raise ValueError("an argument holds no NUL character")
        try:
            reason = refusal(arguments)
        except MixfuseError as error:
            reason = str(error).removeprefix("engine.extra_args: ")
        if reason:
            raise ValueError(reason)
        return arguments

    @field_validator("host")
    @classmethod
    def _loopback(cls, host: str) -> str:
        if host != "localhost" and not host.startswith("127."):
            raise ValueError("the engine listens on a loopback address only; put the gateway before it")
        return host


def _is_url(text: str) -> bool:
    """Whether a text is the URL of a server, of which a path of its own may follow."""
    try:
        parts = urlsplit(text)
        port = parts.port  # raises where it is none
    except ValueError:
        return False
    plain = text.isprintable() and not any(letter.isspace() for letter in text) and not parts.query + parts.fragment
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def served_template(config: EngineConfig) -> str | None:
    """The digest of the template that an engine of this config writes chats with; None if it is not known here.

    It is not known of an external engine, nor where `--chat-template` in `extra_args` goes before the config.
    """
    if config.external or argument(config.extra_args, "--chat-template") is not None:
        return None
    return chat_template.digest_for_engine(config.base, config.chat_template)


class Engine(VllmApi):
    """A vLLM engine as a child process; an async context manager around `start` and `stop`.

    Attributes:
        config: The engine's config.
        api_key: A secret made for this engine; every call to `url` carries it as a bearer token.
        log_path: The engine's log. That of the previous start, or what came before `log_mib`, is beside it as `….1`.
    """

    def __init__(self, config: EngineConfig, *, log_path: Path) -> None:
        self.config = config
        self.log_path = Path(log_path)
        key = secrets.token_urlsafe(32)
        super().__init__(None, key, base_model_name=BASE_MODEL_NAME, hint=f"see {self.log_path}")
        self._process: asyncio.subprocess.Process | None = None
        self._mark = secrets.token_hex(16)
        self._gpu_use: list[int] | None = None  # before the first start

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def started(self) -> str | None:
        """A text that each start of the engine has for itself; None before the first."""
        return f"{self._mark}-{self._process.pid}" if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the engine's process is alive."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the engine and returns when it answers.

        Raises:
            MixfuseError: vLLM is not installed, the base model is missing, the port is in use, the engine died (with
                the error from its log) or took too long, or a process of an earlier start does not end.
        """
        if self.running:
            raise RuntimeError("the engine is running already")
        if find_spec("vllm") is None:
            raise engine_error("vLLM is not installed; run scripts/setup, or pip install 'mixfuse[serve-cpu]'")
        for folder in (self.config.base, self.config.weights or self.config.base):
            if not (folder / "config.json").is_file():
                raise engine_error(f"{folder} holds no base model (no config.json)")
        check_device(self.config, cpu=cpu_build())
        if self.config.node_ip is not None:
            _checked_port(self.config.node_ip, None)
        await self._until_gone()
        template = await asyncio.to_thread(self._template)
        port = _checked_port(self.config.host, self.config.port)
        self._url = f"http://{self.config.host}:{port}/v1"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        _shift(str(self.log_path))  # it may say why the engine was restarted
        self.log_path.touch()
        key_file = self._write_key()
        try:
            await self._run(port, template, key_file)
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
        finally:
            key_file.unlink(missing_ok=True)  # it has been read, or never will be

    async def _run(self, port: int, template: Path | None, key_file: Path) -> None:
        log = (str(self.log_path.absolute()), str(int(self.config.log_mib * 2**20)))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _GUARD, str(_STOP_GRACE_S), *log),
            *command(self.config, port, template=template),
            stdin=asyncio.subprocess.PIPE,  # never written to; it closes when this process ends
            stdout=None if self.config.log_stdout else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={
                **{name: value for name, value in os.environ.items() if not _SECRET.search(name)},
                **environment(self.config),
                _MARK: self._mark,
                # Not the key itself: Ray copies an engine's environment to every node. Nor an argument, which every
                # user of the machine can read.
                KEY_FILE: str(key_file),
            },
            start_new_session=True,  # Ctrl-C must reach only this process
        )

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

    def _write_key(self) -> Path:
        """Writes the key to a file that only this user can read.

        Raises:
            MixfuseError: It cannot be written.
        """
        path = self.log_path.with_name(f"{self.log_path.stem}.{self._mark}.key").absolute()
        try:
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as stream:
                stream.write(str(self.api_key))
        except OSError as error:
            raise engine_error(f"{path}: the engine's key cannot be written: {error.strerror}") from None
        return path

    def _template(self) -> Path | None:
        """Writes the chat template that training uses, if the engine would not find the same one in the base's folder.

        Raises:
            MixfuseError: There is no template of the config's name, it is one that no engine may render, or it cannot
                be written.
        """
        if (own := argument(self.config.extra_args, "--chat-template")) is not None:
            # vLLM takes a file, or the text itself.
            text = own if "{" in own or "\n" in own else chat_template.read_file(Path(own))
            chat_template.bounded(text, f"engine.extra_args: --chat-template {own[:120]}")
            return None
        named = self.config.chat_template
        try:
            template = chat_template.for_engine(self.config.base, named)
        except MixfuseError as error:
            if named is not None or isinstance(error, chat_template.UnboundedTemplateError):
                raise
            logger.warning("the base's own chat template is served as it is: %s", error)
            return None
        if template is None:
            return None
        path = self.log_path.with_name(f"{self.log_path.stem}.chat_template.jinja")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(template, encoding="utf-8")
        except OSError as error:
            raise engine_error(f"{path}: the chat template cannot be written: {error}") from None
        return path.absolute()

    async def _until_gone(self) -> None:
        """Returns once nothing of an earlier start is left: no process, and on GPUs no memory.

        A killed engine's workers can outlive it by many seconds, while the driver frees their memory.
        """
        left = await asyncio.to_thread(_marked, f"{_MARK}={self._mark}")
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(_GONE_S):
                while left := [process for process in left if _started_at(process[0]) == process[1]]:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            pids = ", ".join(str(pid) for pid, _ in left)
            raise engine_error(f"the engine's last start is not gone: process {pids} does not end") from None
        if cpu_build():
            return
        used = await _gpu_use(self.config)
        if self._gpu_use is None:
            self._gpu_use = used
        before = self._gpu_use or []
        try:
            async with asyncio.timeout(_GONE_S):
                while any(now > then + _GPU_REST_MIB for now, then in zip(used or [], before, strict=False)):
                    await asyncio.sleep(_LOOK_S)
                    used = await _gpu_use(self.config)
        except TimeoutError:
            logger.warning("the GPUs hold %s MiB, and held %s before the engine's first start", used, self._gpu_use)

    async def _until_healthy(self) -> None:
        while self.running:
            if await self.healthy(timeout_s=5):
                return
            await asyncio.sleep(0.25)
        raise engine_error(f"the engine died at its start: {last_error(self.log_path)}; see {self.log_path}")


def _marked(mark: str) -> list[tuple[int, str]]:
    """The processes with an environment variable, each with the time of its start, by which a number is no other's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((int(folder.name), _started_at(int(folder.name)) or ""))
        except OSError:  # another user's, or it has just ended
            continue
    return found


def _started_at(pid: int) -> str | None:
    """When a process started, in ticks; None if it has ended. One that has ended is kept until its parent asks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


async def _gpu_use(config: EngineConfig) -> list[int] | None:
    """The memory in use on each GPU of an engine, in MiB; None if nvidia-smi does not say."""
    devices = config.env.get("CUDA_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", *(["-i", devices] if devices else [])]
    process = await asyncio.create_subprocess_exec(
        program, *asked, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    said, _ = await process.communicate()
    lines = said.decode(errors="replace").split()
    return [int(line) for line in lines] if process.returncode == 0 and all(map(str.isdigit, lines)) else None


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
        # oneDNN compiles a kernel for each number of rows of a product, and keeps 1024 of them, of 0.28 MiB each. The
        # rows of an expert are seldom the same, so the engine would grow for many swaps.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    }
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        # Its clients close idle connections first (`fusion/calls/upstream.py`), so that no request meets a closed one.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "HF_HUB_OFFLINE": "1",
        **({"VLLM_HOST_IP": config.node_ip} if config.node_ip else {}),
        **(on_cpu if _on_cpu(cpu) else {}),
        **config.env,
    }


def command(config: EngineConfig, port: int, *, cpu: bool | None = None, template: Path | None = None) -> list[str]:
    """The API server's command line. `vllm serve` is not used: it needs a distribution that vllm-cpu does not have.

    Args:
        config: The engine's config.
        port: The port it listens on.
        cpu: Whether it runs on a CPU; None: as the installed vLLM does.
        template: The file of the chat template; None: as vLLM finds it.

    Raises:
        MixfuseError: The base's family, whose parser of tool calls is wanted, is unknown.
    """
    # Workers on other nodes have another working directory, so paths are absolute.
    base, weights = config.base.absolute(), (config.weights or config.base).absolute()
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(weights), "--served-model-name", BASE_MODEL_NAME),
        *(["--tokenizer", str(base)] if config.weights else []),
        *("--host", config.host, "--port", str(port)),
        *("--dtype", config.dtype_on(cpu=_on_cpu(cpu)), "--max-model-len", str(config.max_model_len)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--enable-lora", "--max-lora-rank", str(config.max_lora_rank)),
        *("--max-loras", str(config.max_loras), "--lora-target-modules", *LORA_TARGETS),
        *("--max-cpu-loras", str(config.cpu_loras)),
        *("--max-logprobs", str(TOP_LOGPROBS)),
        *("--generation-config", "vllm"),  # the model's own would change the sampling of requests
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *("--middleware", MIDDLEWARE),
        *(["--chat-template", str(template)] if template else []),
        *(["--enable-auto-tool-choice", "--tool-call-parser", parser] if (parser := _tool_parser(config)) else []),
        # On a CPU, compiling takes longer than it saves. The cache's default block of 128 tokens is longer than short
        # prompts, which then share no prefix; 32 is the smallest block that the CPU attention accepts.
        *(["--enforce-eager", "--block-size", "32"] if _on_cpu(cpu) else []),
        *config.extra_args,
    ]


def _tool_parser(config: EngineConfig) -> str | None:
    return family_of(config.base).tool_parser if config.tool_parser == FAMILY_TOOLS else config.tool_parser


def check_device(config: EngineConfig, *, cpu: bool) -> None:
    """Refuses a type of numbers that vLLM's kernels for LoRA do not take (vllm/lora/ops/triton_ops).

    Raises:
        MixfuseError: It is float32 on GPUs.
    """
    if config.dtype == "float32" and not cpu:
        raise engine_error(
            "engine.dtype: float32 is for a CPU; vLLM's kernels for LoRA on GPUs take bfloat16 and float16; leave "
            "it out, or write bfloat16"
        )


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


def _shift(path: str) -> None:
    """Keeps a log as `….1`, and those before it as `….2` and `….3`."""
    import os

    for old, new in ((f"{path}.2", f"{path}.3"), (f"{path}.1", f"{path}.2"), (path, f"{path}.1")):
        if os.path.exists(old):
            os.replace(old, new)


def _guard() -> None:
    """Runs a command; ends all its processes when it ends, when a signal arrives, or when the guard's parent is gone.

    What they write goes to a log, and to the guard's standard output. A log that is full is kept (`_shift`), and a new
    one is begun; nothing is lost in between, since all of it passes through here.

    The guard runs as a program of its own, from this source, so that it starts at once and imports nothing of mixfuse.
    vLLM is three processes deep, and a child does not always notice that its parent was killed. The guard's parent
    holds the write end of its stdin, which the kernel closes however the parent ends, SIGKILL included. As a subreaper
    the guard inherits every orphan below it, so it knows when all of them are gone.
    """
    import contextlib
    import ctypes
    import os
    import select
    import signal
    import subprocess
    import sys
    import threading
    import time

    path, most = sys.argv[2], int(sys.argv[3])

    def open_log() -> None:
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, 2)
        os.close(opened)

    open_log()
    set_pdeathsig, set_child_subreaper = 1, 36  # linux/prctl.h
    libc = ctypes.CDLL(None)
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    server = subprocess.Popen(
        sys.argv[4:],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(set_pdeathsig, signal.SIGTERM),  # noqa: PLW1509 - one thread
    )
    status: int | None = None

    def write_log(said: int) -> None:
        written = 0
        while piece := os.read(said, 1 << 16):
            for target in (1, 2):
                with contextlib.suppress(OSError):  # a full disk or a closed pipe must not stop the engine
                    os.write(target, piece)
            written += len(piece)
            if written >= most:
                with contextlib.suppress(OSError):  # it goes on in the old one
                    _shift(path)
                    open_log()
                written = 0

    assert server.stdout is not None  # noqa: S101 - a pipe
    writing = threading.Thread(target=write_log, args=(server.stdout.fileno(),), daemon=True)
    writing.start()

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
    writing.join(1.0)
    sys.exit(status)


_GUARD = f"{inspect.getsource(_shift)}\n{inspect.getsource(_guard)}\n_guard()"
