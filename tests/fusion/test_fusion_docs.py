"""docs/api.md: every command in it runs, and its tables name what there is."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fake_upstream import FakeUpstream, Script, fake_upstream, serving
from fusion_harness import Gateway

from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Verdict
from mixfuse.fusion.config import Expose, FusionConfig, FusionOptions
from mixfuse.fusion.http.ask_client import REASONS
from mixfuse.fusion.http.gateway import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first heading that is, without backticks."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table, heading
    return [[cell.strip().replace("`", "") for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def good(answer: str) -> bool:
    return "legs" in answer or "weather" in answer


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    count = '{"legs": 24}'
    async with fake_upstream(
        **{
            "small-1": Script("six"),
            "large-1": Script(count, tool_calls=[("weather", "{}")]),
            "coder-1": Script("24"),
            "embed-1": Script(),
            "judge-1": Script(verdict=lambda first, second: 0.5 + 0.4 * (good(first) - good(second))),
        }
    ) as fake:
        yield fake


@pytest.fixture
async def documented(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway with the page's config, its endpoints replaced by the fake."""
    (text,) = blocks("yaml")
    data = yaml.safe_load(text.replace("https://models.example/v1", upstream.base_url))
    config = validate(data | {"trace_db": str(tmp_path / "traces.sqlite3")}, FusionConfig, source="docs/api.md")
    async with serving(create_app(config, None)) as url:
        gateway = Gateway(url)
        yield gateway
        await gateway.close()


async def run(gateway: Gateway, *command: str, script: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        script.replace("http://127.0.0.1:8080", gateway.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
    )
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_pages_python_runs(documented: Gateway) -> None:
    printed = await run(documented, sys.executable, "-c", script="\n".join(blocks("python")))
    lines = printed.splitlines()
    assert '{"legs": 24}' in lines[0]
    assert lines[1] == "judged"
    assert "24" in lines
    assert "tool_calls" in lines
    assert "unsupported_parameter n" in lines
    assert '{"legs": 24} judged' in lines
    assert "2 vectors" in lines


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_pages_commands_run(documented: Gateway) -> None:
    printed = await run(documented, "bash", "-euo", "pipefail", "-c", script="\n".join(blocks("bash")))
    assert '"object":"chat.completion"' in printed
    assert '"id":"careful"' in printed
    assert '"feedback":[{"score":1}]' in printed
    assert '"mode":"merge"' in printed


def test_the_options_are_all_there() -> None:
    assert [row[0] for row in rows("option")] == list(FusionOptions.model_fields)


def test_the_reasons_are_all_there() -> None:
    assert {row[0] for row in rows("`reason`")} == set(REASONS)


async def test_the_fields_are_all_there(documented: Gateway, upstream: FakeUpstream) -> None:
    question = [{"role": "user", "content": "?"}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    upstream.models["large-1"].text = ["a", "b [from 1]"]
    asked: list[dict[str, Any]] = [
        {"model": "fusion/best-of", "messages": question},
        {"model": "careful", "messages": question},
        {"model": "fusion/merge", "messages": question, "fusion": {"cite": True}},
        *[{"model": "fusion/best-of", "messages": question, "fusion": {"cache": True}}] * 2,
        {"model": "fusion/best-of", "messages": [{"role": "user", "content": [picture]}]},
    ]
    fields_by_expose: dict[str, set[str]] = {}
    for expose in get_args(Expose):
        field_names: set[str] = set()
        for body in asked:
            options = {**body.get("fusion", {}), "expose": expose}
            fusion = (await documented.post(**{**body, "fusion": options})).json().get("fusion", {})
            field_names |= fusion.keys()
            for verdict in fusion.get("verdicts", ()):
                assert verdict.keys() == Verdict.model_fields.keys()
        fields_by_expose[expose] = field_names
    table = {name: expose for name, expose, _ in rows("field")}
    assert fields_by_expose["none"] == set()
    assert fields_by_expose["summary"] == {name for name, expose in table.items() if expose == "summary"}
    assert fields_by_expose["full"] == set(table)
    (verdicts,) = [row[2] for row in rows("field") if row[0] == "verdicts"]
    assert all(name in verdicts for name in Verdict.model_fields)
