"""Data sets: formats, weights, truncation, the held-out share, and rows that stay where they are on disk."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
from train_harness import PROJECT, write_jsonl

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data import chat_data, chats, packing, prepared
from mixfuse.train.recipe import DataSource, SftRecipe

SHARED = PROJECT.parent / "shared" / "data"


def chat(number: int, words: int = 3, name: str = "") -> dict[str, Any]:
    said = {"role": "user", "content": f"{name}Say {number}"}, {"role": "assistant", "content": " go" * words}
    return {"id": f"{name}{number}", "messages": list(said)}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from mixfuse.train.model.tokenizer import load_tokenizer

    return load_tokenizer(tiny_base)


@pytest.fixture
def prepare(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> Any:
    """Prepares data sets given as lists of rows, under a recipe with further keys."""
    recipe_path = harness.sft_recipe(tmp_path, tiny_base)

    def make(*sets: list[dict[str, Any]], resuming: bool = False, **keys: Any) -> chat_data.ChatData:
        sources = [str(write_jsonl(tmp_path / f"{number}.jsonl", rows)) for number, rows in enumerate(sets)]
        weights = keys.pop("weights", [1] * len(sets))
        keys["data"] = [{"path": path, "weight": weight} for path, weight in zip(sources, weights, strict=True)]
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        recipe = load(recipe_path, SftRecipe, overrides)
        data = prepared.prepare(chat_data.CHATS, recipe, tokenizer, resuming=resuming)
        return chat_data.chat_data(recipe, tokenizer, data)

    return make


def ids(rows: Any) -> list[str]:
    return [document["id"] for row in rows for document in row["documents"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["auto", "named"])
def test_every_format_reads_as_the_same_chat(form: str, suffix: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    shapes = {
        "messages": {"messages": messages},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        "prompt_completion": {"prompt": "Hi", "completion": "Ho"},
    }
    for name, shape in shapes.items():
        path = tmp_path / (name + suffix)
        row = {"id": 7, **shape}
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        else:
            write_jsonl(path, [row, row])
        source = DataSource(path=path, format="auto" if form == "auto" else name)
        assert [(chat.id, chat.messages) for chat in chats.chats(source)] == [("7", messages)] * 2


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        ({"prompt": "a"}, "prompt_completion", "x.jsonl:1: missing key 'completion'"),
        (
            {"conversations": [{"from": "bot", "value": "a"}] * 2},
            "auto",
            "x.jsonl:1: conversations.0. of a ShareGPT row is from 'bot'",
        ),
        ({"conversations": "none"}, "sharegpt", "x.jsonl:1: conversations is a text, but no JSON"),
        ({"text": "a"}, "auto", "x.jsonl:1: no chat: these are plain texts"),
        (
            {"prompt": "a", "completion": None},
            "auto",
            "x.jsonl:1: 'prompt' stands without 'completion', or with an empty one",
        ),
    ],
)
def test_a_row_of_another_format_is_named(row: Any, form: Any, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(MixfuseError, match=message):
        list(chats.chats(DataSource(path=path, format=form)))


def test_a_file_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(MixfuseError, match=r"x.parquet: not a readable Parquet file"):
        list(chats.chats(DataSource(path=tmp_path / "x.parquet")))


def test_a_data_set_of_the_hub_is_loaded_by_datasets(tmp_path: Path) -> None:
    """A folder stands for a repository: `load_dataset` takes either, and nothing here reaches the Hub."""
    write_jsonl(tmp_path / "train.jsonl", [chat(1), chat(2)])
    write_jsonl(tmp_path / "test.jsonl", [chat(3)])
    for split, expected in (("train", ["1", "2"]), ("test", ["3"])):
        source = DataSource(hub=str(tmp_path), split=split)
        assert [found.id for found in chats.chats(source)] == expected
    with pytest.raises(MixfuseError, match=r"\(validation\): cannot be loaded from the Hugging Face Hub or its"):
        list(chats.chats(DataSource(hub=str(tmp_path), split="validation")))


def test_several_processes_tokenise_the_same_without_a_fork(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork copies locks that threads of torch or NCCL may hold."""

    def fork() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", fork)
    rows = [chat(n, words=n) for n in range(20)]
    one, two = prepare(rows).train, prepare(rows, data_processes=2, seed=1).train
    assert [row["documents"] for row in two] == [row["documents"] for row in one]
    with pytest.raises(MixfuseError, match=r"0.jsonl:\d+: the chat has \d+ tokens"):
        prepare(rows, data_processes=2, truncation="error", max_length=50)


def test_sets_are_drawn_by_weight_until_each_was_read(prepare: Any) -> None:
    sets = [[chat(n, name="a") for n in range(300)], [chat(n, name="b") for n in range(20)]]
    drawn = ids(prepare(*sets, weights=[3, 1]).train)
    counts = Counter(name[0] for name in drawn)
    assert 0.2 < counts["b"] / len(drawn) < 0.3
    assert set(drawn) == {row["id"] for rows in sets for row in rows}
    assert ids(prepare(*sets, weights=[3, 1]).train) == drawn
    assert ids(prepare(*sets, weights=[3, 1], seed=1).train) != drawn
    assert ids(prepare(*sets, weights=[3, 1], seed=1, data_seed=0).train) == drawn


def test_truncation(prepare: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(0), chat(1, words=60)]
    whole = {row["id"]: row for entry in prepare(rows).train for row in entry["documents"]}
    short = 50
    assert len(whole["0"]["input_ids"]) < short < len(whole["1"]["input_ids"])

    assert ids(prepare(rows, truncation="drop", max_length=short).train) == ["0"]
    assert "left out 1 of 2 chats longer than 50 tokens" in capsys.readouterr().out
    for side, part in (("left", slice(-short, None)), ("right", slice(short))):
        (_, cut) = prepare(rows, truncation=side, max_length=short).train
        (document,) = cut["documents"]
        assert document["input_ids"] == whole["1"]["input_ids"][part]
        assert document["labels"] == [-100, *whole["1"]["labels"][part][1:]]
    with pytest.raises(MixfuseError, match=r"0.jsonl:2: the chat has \d+ tokens, more than max_length 50"):
        prepare(rows, truncation="error", max_length=short)
    with pytest.raises(MixfuseError, match="no chat fits max_length 5"):
        prepare(rows, max_length=5)
    with pytest.raises(MixfuseError, match="no chat fits max_length 20"):
        prepare(rows, truncation="right", max_length=20)  # only the system message is left, nothing to learn


def test_equal_prompts_stand_on_one_side(prepare: Any) -> None:
    rows = [{**chat(n % 40), "id": str(n)} for n in range(120)]
    train, evaluation, count, _ = prepare(rows, evaluation={"share": 0.25})
    held_out = {int(row["id"]) % 40 for row in evaluation}
    trained = {int(name) % 40 for name in ids(train)}
    assert held_out
    assert not held_out & trained
    assert held_out | trained == set(range(40))
    assert count == len(train) == 120 - len(evaluation)
    few = prepare(rows, evaluation={"share": 0.25, "limit": 5}).evaluation
    assert list(few["id"]) == list(evaluation["id"])[:5]
    with pytest.raises(MixfuseError, match="no chat is in the held-out share"):
        prepare(rows[:1], evaluation={"share": 0.01})


def test_rows_stay_on_disk_and_a_resumed_run_finds_them(prepare: Any, tmp_path: Path) -> None:
    rows = [chat(n) for n in range(50)]
    first = prepare(rows)
    assert not list((tmp_path / "sft").rglob("*.arrow"))
    cache = tmp_path / prepared.FOLDER
    assert sum(file.stat().st_size for file in cache.rglob("*.arrow")) > 10_000
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    again = prepare(rows, resuming=True)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == made
    assert ids(again.train) == ids(first.train)
    with pytest.raises(MixfuseError, match="whose data has changed since it began"):
        prepare(rows[:-1], resuming=True)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == made, "tokenised before it was refused"
    assert len(prepare(rows[:-1]).train) == 49


def test_a_big_data_set_is_not_held_in_memory(tmp_path: Path) -> None:
    """Reading 60 MB of chats row by row takes a small part of that."""
    import tracemalloc

    row = json.dumps(chat(0, words=1000)) + "\n"
    with (tmp_path / "big.jsonl").open("w") as stream:
        stream.writelines(row for _ in range(20_000))
    size = (tmp_path / "big.jsonl").stat().st_size
    tracemalloc.start()
    assert sum(1 for _ in chats.chats(DataSource(path=tmp_path / "big.jsonl"))) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 20


def test_packing_fills_rows_with_whole_documents() -> None:
    import random

    rng = random.Random(0)
    lengths = [min(512, int(rng.lognormvariate(4.5, 0.8))) for _ in range(9000)]
    rows = packing.packed(lengths, 512, 0)
    assert sorted(document for row in rows for document in row) == list(range(9000))
    sums = [sum(lengths[document] for document in row) for row in rows]
    assert max(sums) <= 512
    assert sum(sums) / (512 * len(rows)) > 0.97
    assert packing.packed(lengths, 512, 0) == rows
    assert packing.packed(lengths, 512, 1) != rows


@pytest.mark.parametrize("name", ["gsm8k_sft", "tldr"])
def test_a_real_data_set(name: str, prepare: Any, tokenizer: Any) -> None:
    path = SHARED / name / "train.jsonl"
    if not path.is_file():
        pytest.skip("the data folder ../shared/data is not here")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    train, _, count, _ = prepare(rows, packing=True, max_length=1024)
    assert count == 200
    assert sorted(ids(train)) == sorted(row["id"] for row in rows)
    answers = {row["id"]: row["messages"][-1]["content"] for row in rows}
    for row in train:
        for document in row["documents"]:
            said = [token for token in document["labels"] if token != -100]
            assert tokenizer.decode(said) == answers[document["id"]] + "<|im_end|>"
