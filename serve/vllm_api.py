"""The HTTP client of one vLLM server: loads and unloads adapters, and asks for log-probabilities.

It does not know who runs the server. `serve/engine.py` starts one; `serve/supervisor.py` also watches external ones.
"""

import asyncio
import functools
import math
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from mixfuse.contracts.adapter import LORA_TARGETS
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import known_families

TOP_LOGPROBS = 20  # a judge's verdict is read from this many first tokens
_NO_ADAPTER = "mixfuse-no-such-adapter"
# Bodies that are refused where they are read, and an adapter that nobody has.
_DOORS: tuple[tuple[str, str, dict[str, str] | None], ...] = (
    ("GET", "/v1/models", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}),
    ("POST", "/adapters", {}),
    ("DELETE", f"/adapters/{_NO_ADAPTER}", None),
    ("POST", "/invocations", {}),
)
_SERVED_LINEAR = re.compile(r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj)\.lora_[AB]\.weight$")
# One line for each engine core, of which data parallelism has several.
_STEPS = re.compile(r"^vllm:iteration_tokens_total_count\{.*\} (\S+)$", re.MULTILINE)
_RANK = re.compile(r'^vllm:num_requests_running\{(?:.*,)?engine="(\d+)"', re.MULTILINE)
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)


class VllmApi:
    """A vLLM server's HTTP interface.

    Args:
        url: The base URL of its OpenAI API, `…/v1`; None until it is known.
        api_key: The bearer token of every call; None for no token.
        base_model_name: The base's model name; each adapter has its own.
        hint: Ends the error when the server does not answer, e.g. "see runs/logs/engine.log".
        rank: The data-parallel copy of the model that answers; None: the one with the fewest requests.
    """

    def __init__(
        self, url: str | None, api_key: str | None, *, base_model_name: str, hint: str, rank: int | None = None
    ) -> None:
        self._url, self._rank = url, rank
        self.api_key = api_key
        self.base_model_name = base_model_name
        self._hint = hint

    @property
    def started(self) -> str | None:
        """A text that each start of the engine has for itself; None here, where nobody knows when it was started."""
        return None

    @property
    def url(self) -> str:
        """The base URL of the OpenAI API, known once the engine has been started."""
        if self._url is None:
            raise RuntimeError("the engine has not been started")
        return self._url

    async def load_adapter(self, name: str, path: Path, *, timeout_s: float = 600) -> None:
        """Loads an adapter, which then answers as model `name`.

        Args:
            name: A name that is not loaded yet and is not the base model's.
            path: A PEFT adapter folder in the layout that vLLM reads.
            timeout_s: The longest that it may take. vLLM reads the files between two steps of the engine.

        Raises:
            MixfuseError: The folder has weights that vLLM would silently ignore, or vLLM refuses it.
        """
        if name == self.base_model_name:
            raise MixfuseError(f"{name!r} is the base model's name; give the adapter another", kind="adapter")
        folder = await asyncio.to_thread(_served_adapter, path)
        await self._adapter_call("load_lora_adapter", timeout_s, lora_name=name, lora_path=str(folder))

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter. Requests that still use it are lost, so drain it first.

        Raises:
            MixfuseError: No adapter of that name is loaded.
        """
        await self._adapter_call("unload_lora_adapter", 120, lora_name=name)

    async def probe(self, name: str) -> None:
        """Asks a model for one token, to detect an adapter that cannot answer before it serves.

        Raises:
            MixfuseError: It does not answer.
        """
        await self._post("completions", {"model": name, "prompt": [0], "max_tokens": 1})

    async def prompt_logprobs(self, name: str, prompt: list[int]) -> list[float]:
        """Log-probabilities, in nats, of each prompt token but the first, given the tokens before it.

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

    async def decode(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        """Writes on greedily, a token at a time.

        Args:
            name: The base model's name, or an adapter's.
            prompt: Token ids.
            tokens: How many to write, whatever they are.

        Returns:
            The tokens' ids, and their log-probabilities in nats.

        Raises:
            MixfuseError: The engine does not answer.
        """
        sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
        choice = (await self._post("completions", {"model": name, "prompt": prompt, **sampling}))["choices"][0]
        written = choice.get("token_ids") or []
        if len(written) != tokens:
            raise engine_error(
                f"{self.url} returned {len(written)} of {tokens} token ids: does its vLLM know return_token_ids?"
            )
        return list(written), list(choice["logprobs"]["token_logprobs"])

    async def first_token_logprobs(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """Token text → log-probability, in nats, of the likeliest first tokens of the answer to chat messages.

        Args:
            name: The base model's name, or an adapter's.
            messages: The conversation.

        Raises:
            MixfuseError: The engine does not answer.
        """
        sampling = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        answer = await self._post("chat/completions", {"model": name, "messages": messages, **sampling})
        logprobs: dict[str, float] = {}
        for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            # SentencePiece's "A" and "▁A" both decode to "A".
            token, logprob = top["token"], top["logprob"]
            known = logprobs.get(token)
            logprobs[token] = logprob if known is None else math.log(math.exp(known) + math.exp(logprob))
        return logprobs

    async def models(self, *, timeout_s: float = 10) -> tuple[str, Mapping[str, str | None]]:
        """Returns the base model's name, and the loaded adapters: name → the folder it was loaded from, if it says so.

        Raises:
            MixfuseError: The server does not answer within `timeout_s`, refuses the key, or serves no base model.
        """
        response = await self._send("GET", "models", timeout_s=timeout_s)
        if response.is_error:
            raise engine_error(f"{self.url} refused to list its models: {_reason(response)}")
        try:
            rows = {str(row["id"]): (row.get("parent"), row.get("root")) for row in response.json()["data"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise engine_error(f"{self.url} is no vLLM: it does not list its models") from None
        bases = [name for name, (parent, _) in rows.items() if parent is None]
        if not bases:
            raise engine_error(f"{self.url} serves no base model")
        return bases[0], {name: root for name, (parent, root) in rows.items() if parent is not None}

    async def max_model_len(self) -> int | None:
        """The longest prompt and completion together, in tokens; None if the server does not say.

        Raises:
            MixfuseError: The server does not answer, or refuses the key.
        """
        response = await self._send("GET", "models", timeout_s=10)
        if response.is_error:
            raise engine_error(f"{self.url} refused to list its models: {_reason(response)}")
        try:
            lengths = [row.get("max_model_len") for row in response.json()["data"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise engine_error(f"{self.url} is no vLLM: it does not list its models") from None
        return next((length for length in lengths if isinstance(length, int) and length > 1), None)

    async def open_doors(self) -> list[str]:
        """The routes by which anybody without a key could change or use the server. Asking changes nothing.

        Raises:
            MixfuseError: The server does not answer.
        """
        stranger = VllmApi(self._url, None, base_model_name=self.base_model_name, hint=self._hint)
        found = []
        for method, route, body in _DOORS:
            response = await stranger._send(method, f"..{route}", body, timeout_s=10)
            missing = response.status_code in (404, 405) and _NO_ADAPTER not in response.text  # there is no such route
            if response.status_code not in (401, 403) and not missing:
                found.append(f"{method} {route}")
        return found

    async def healthy(self, *, timeout_s: float) -> bool:
        """Whether the server's health check succeeds within `timeout_s`."""
        try:
            response = await self._send("GET", "../health", timeout_s=timeout_s)
        except MixfuseError:
            return False
        return response.is_success

    async def working(self, *, timeout_s: float) -> bool:
        """Whether the engine answers one token within `timeout_s`, or at least takes steps: a full queue is no hang.

        `/health` does not show a hang: vLLM's API server answers it even if the engine core hangs.
        """
        before = await self._steps(timeout_s)
        body = {"model": self.base_model_name, "prompt": [0], "max_tokens": 1}
        try:
            if (await self._send("POST", "completions", body, timeout_s=timeout_s)).is_success:
                return True
        except MixfuseError:
            pass  # no answer: its steps decide
        return await self._steps(timeout_s) != before

    async def metrics(self, *, timeout_s: float) -> str:
        """The server's metrics, in Prometheus' text format.

        Raises:
            MixfuseError: It does not answer.
        """
        return (await self._send("GET", "../metrics", timeout_s=timeout_s)).text

    async def busy(self) -> bool:
        """Whether the engine works on a request, or has one waiting; not if its metrics do not say so.

        Raises:
            MixfuseError: It does not answer.
        """
        return any(float(count) > 0 for count in _REQUESTS.findall(await self.metrics(timeout_s=10)))

    async def ranks(self) -> "list[VllmApi]":
        """This server's data-parallel copies of the model, each as a client that asks it alone; itself if it has one.

        Raises:
            MixfuseError: It does not answer.
        """
        ranks = sorted({int(rank) for rank in _RANK.findall(await self.metrics(timeout_s=10))})
        return [_Copy(self, rank) for rank in ranks] if len(ranks) > 1 else [self]

    async def _steps(self, timeout_s: float) -> float | None:
        """The count of the engine cores' steps, from their metrics; None if they do not answer."""
        try:
            text = await self.metrics(timeout_s=timeout_s)
        except MixfuseError:
            return None
        counts = _STEPS.findall(text)
        return sum(map(float, counts)) if counts else None

    async def _adapter_call(self, endpoint: str, timeout_s: float, **body: str) -> None:
        response = await self._send("POST", endpoint, body, timeout_s=timeout_s)
        if response.is_error:
            raise MixfuseError(f"vLLM refused {endpoint} of {body['lora_name']!r}: {_reason(response)}", kind="adapter")

    async def _post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._send("POST", endpoint, body)
        if response.is_error:
            raise engine_error(f"vLLM refused {endpoint} of {body['model']!r}: {_reason(response)}")
        answer: dict[str, Any] = response.json()
        return answer

    async def _send(
        self, method: str, endpoint: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 120
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if self._rank is not None:
            headers["X-data-parallel-rank"] = str(self._rank)
        try:
            async with httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=_tls()) as client:
                return await client.request(method, f"{self.url}/{endpoint}", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise engine_error(
                f"the engine at {self.url} does not answer ({type(error).__name__}); {self._hint}"
            ) from None


class _Copy(VllmApi):
    """One of a server's data-parallel copies of the model."""

    def __init__(self, server: VllmApi, rank: int) -> None:
        super().__init__(
            server.url, server.api_key, base_model_name=server.base_model_name, hint=server._hint, rank=rank
        )
        self._server = server

    @property
    def started(self) -> str | None:
        """As the server's, for each copy another."""
        started = self._server.started
        return f"{started}-{self._rank}" if started is not None else None


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the certificates takes 20 ms on the event loop, and each client would repeat it."""
    return httpx.create_ssl_context(trust_env=False)


def engine_error(message: str) -> MixfuseError:
    """Returns an error of kind "engine"."""
    return MixfuseError(message, kind="engine")


def _served_adapter(folder: Path) -> Path:
    """Returns the adapter's absolute path; refuses weights that vLLM would load with "Success" and then ignore.

    vLLM does so with experts in PEFT's fused layout (`check_unexpected_modules` in vllm/lora/lora_model.py accepts
    them, and Mixtral's layers do not use them; Qwen3-MoE's raise an error) and with modules outside of
    `--lora-target-modules`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder).resolve() / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="np") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise MixfuseError(f"cannot read {path}: {error}", kind="adapter") from None
    if unserved := [name for name in names if not _is_served(name)]:
        raise MixfuseError(
            f"{path}: vLLM would silently ignore {unserved[0]}; name experts as vLLM does ({_expert_examples()}) "
            f"and adapt no other modules than {', '.join(LORA_TARGETS)}",
            kind="adapter",
        )
    return path.parent


def _is_served(name: str) -> bool:
    """Whether vLLM applies a factor of this name.

    vLLM 0.32 compares only what follows `.experts` with the names it expects (`check_unexpected_modules` in
    vllm/lora/lora_model.py). It accepts experts of a block that the base does not have, and then ignores them.
    """
    if ".experts" in name:
        return any(family.expert_factor.match(name) for family in known_families().values())
    return bool(_SERVED_LINEAR.search(name))


def _expert_examples() -> str:
    return " or ".join(f"{family.checkpoint_block}.experts.0.{family.gate}" for family in known_families().values())


def _reason(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return " ".join(str(message).split())[:500]
