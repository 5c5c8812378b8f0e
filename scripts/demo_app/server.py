"""`mixfuse serve` as a child process, and a swap of its judge while clients keep asking."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

MIXFUSE = [str(Path(sys.executable).with_name("mixfuse"))]
STOP_WITHIN_S = 60
LEAST_REQUESTS = 16  # in all, so that some are under way before, during and after the swap
CONSUMERS = ("judge", "judge", "domain", "base", "fusion/best-of")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(config: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Runs `mixfuse serve` for as long as the block runs; gives its URL.

    Raises:
        CalledProcessError: It ended before it was ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*MIXFUSE, "serve", str(config), f"gateway.port={port}", *overrides]
    process = subprocess.Popen(command)
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=STOP_WITHIN_S)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    while True:
        if process.poll() is not None:
            raise subprocess.CalledProcessError(process.returncode, [*MIXFUSE, "serve"])
        try:
            if httpx.get(f"{url}/healthz", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass  # nothing listens yet
        time.sleep(0.5)


async def swap_under_load(url: str, adapter: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Swaps the judge while clients keep asking.

    Returns:
        `requests_during`, how many requests ran meanwhile, and `failed`, how many of them failed.

    Raises:
        CalledProcessError: The swap itself failed.
    """
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900)
    flowing, swapped = asyncio.Event(), asyncio.Event()
    requests = failed = 0

    async def ask_until_swapped(model: str) -> None:
        nonlocal requests, failed
        rng = random.Random(model)  # noqa: S311 - which question is no secret
        while not swapped.is_set() or requests < LEAST_REQUESTS:
            try:
                answer = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": rng.choice(prompts)}], max_tokens=8
                )
                failed += answer.choices[0].message.content is None
            except Exception as error:
                print(f"a request failed during the swap: {error}")
                failed += 1
            requests += 1
            if requests >= len(CONSUMERS):
                flowing.set()

    async def swap() -> None:
        await flowing.wait()
        command = [*MIXFUSE, "roles", "swap", "judge", str(adapter), "--url", url]
        process = await asyncio.create_subprocess_exec(*command, env=os.environ)
        code = await process.wait()
        swapped.set()
        if code:
            raise subprocess.CalledProcessError(code, command)

    await asyncio.gather(swap(), *(ask_until_swapped(model) for model in CONSUMERS))
    print(f"{requests} requests during the swap, {failed} failed")
    return {"requests_during": requests, "failed": failed}
