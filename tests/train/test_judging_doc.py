"""docs/judging.md, data and the loop: its commands run, its YAML is read, its words are those of the code."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from train_harness import PROJECT, write_jsonl

from mixfuse.app.loop_config import LoopConfig
from mixfuse.app.pairs_spec import Kind
from mixfuse.app.verifiers import Comparing
from mixfuse.cli.entry import main
from mixfuse.contracts.files import read_json
from mixfuse.contracts.strict_yaml import validate
from mixfuse.train.data.pair_filters import LENGTH_BINS, Filters, Trait

PAGE = (PROJECT / "docs" / "judging.md").read_text(encoding="utf-8")
DATA, LOOP = (
    re.split(r"^## ", PAGE.split(f"## {name}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    for name in ("Data", "The loop")
)
DATA_YAML, LOOP_YAML = (re.findall(r"^```yaml\n(.*?)^```", part, re.MULTILINE | re.DOTALL) for part in (DATA, LOOP))


def test_the_commands_about_data_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    responses = [{"model": f"m-{n}", "text": f"First this, then that, so in the end it is {n}."} for n in (4, 5)]
    marked = [{**response, "correct": response["text"].endswith("4.")} for response in responses]
    reference = responses[0]["text"].replace("First", "Again")
    rows = [{"id": n, "prompt": f"{n} + {4 - n}?", "reference": reference, "responses": marked} for n in range(60)]
    write_jsonl(Path("pool.jsonl"), rows)
    a, b = ({"text": text} for text in ("well", "ill!"))
    labels = [{"prompt": f"How is {n}?", "response_a": a, "response_b": b, "label": "A"} for n in range(60)]
    write_jsonl(Path("labels.jsonl"), labels)
    write_jsonl(Path("frozen.jsonl"), labels[:1])
    Path("spec.yaml").write_text(DATA_YAML[0])
    commands = re.findall(r"^mixfuse (.*)$", DATA, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)) == 0, command
    assert read_json(Path("pairs.card.json"))["balanced"] == []
    assert {name.partition(":")[0] for name in read_json(Path("runs/pairs.card.json"))["by_source"]} == {
        "pool", "references", "people", "synthetic",
    }  # fmt: skip


def test_the_loop_s_config_is_one() -> None:
    config = validate(yaml.safe_load(LOOP_YAML[0]), LoopConfig, source="the page")
    assert config.server
    assert f"`settle_s` ({config.traces.settle_s:g})" in LOOP


def test_the_words_of_the_page_are_those_of_the_code() -> None:
    sources = DATA.partition("### Sources\n")[2].partition("\n### ")[0]
    kinds = re.findall(r"^- `(\w+)`: ", sources, re.MULTILINE)
    assert kinds == list(get_args(Kind))
    for name in (*get_args(Comparing), *get_args(Trait)):
        assert f"`{name}`" in DATA, name
    assert f"in {LENGTH_BINS} bins" in DATA
    assert f"`near` ({Filters().near})" in DATA
