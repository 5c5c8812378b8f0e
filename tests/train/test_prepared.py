"""The cache of tokenised data: shared by content, made once, whole or not there, whatever ends the process."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness
from train_harness import ENVIRONMENT, mixfuse, write_jsonl

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data import prepared
from mixfuse.train.data.chat_data import CHATS
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import JudgeRecipe, SftRecipe
from mixfuse.train.stages.prepare_data import prepare_data


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    return harness.sft_recipe(tmp_path, tiny_base)


def prepare(recipe: Path, *overrides: str) -> list[Path]:
    return prepare_data(load(recipe, SftRecipe, list(overrides))).train


def content(folder: Path) -> dict[str, int]:
    """What a folder holds, hidden files too, with the time of the last change."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def chats(path: Path, count: int) -> Path:
    said = [{"role": "user", "content": "Count: " + "one two three " * 30}, {"role": "assistant", "content": "four"}]
    return write_jsonl(path, [{"id": str(n), "messages": said} for n in range(count)])


def test_runs_share_what_has_the_same_content(recipe: Path, tmp_path: Path) -> None:
    (entry,) = prepare(recipe)
    cache = tmp_path / prepared.FOLDER
    assert entry.parent == cache
    before = content(cache)
    (tmp_path / "chats.jsonl").touch()
    assert prepare(recipe, f"out={tmp_path / 'other'}", "optimizer.steps=9", "seed=4", "packing=true") == [entry]
    moved = tmp_path / "elsewhere" / "chats.jsonl"
    moved.parent.mkdir()
    shutil.copy(tmp_path / "chats.jsonl", moved)
    assert prepare(recipe, f"data={moved}") == [entry]
    assert content(cache) == before
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    for override in ("max_length=100", "loss_on=last", "evaluation={share: 0.3}", f"chat_template={template}"):
        assert prepare(recipe, override) != [entry]
    with (tmp_path / "chats.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert prepare(recipe) != [entry]
    assert prepare(recipe, f"data_cache={tmp_path / 'mine'}")[0].parent == tmp_path / "mine"


def test_the_command_says_what_it_prepared_and_training_only_reads_it(recipe: Path, tmp_path: Path) -> None:
    done = mixfuse("data", "prepare", recipe, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["data"]
    assert (row["train"], row["held_out"], row["read"]) == (16, 0, 16)
    entry = Path(row["folder"])
    assert row["bytes"] == (entry / prepared.TRAIN).stat().st_size
    before = content(entry.parent)
    done = mixfuse("train", "sft", recipe, "optimizer.steps=1")
    assert done.returncode == 0, done.stderr
    assert "tokenised already" in done.stdout
    assert "mismatch" not in done.stdout + done.stderr, "accelerate's count of micro batches is not what is used"
    assert content(entry.parent) == before


def test_a_damaged_entry_is_made_again(recipe: Path) -> None:
    (entry,) = prepare(recipe)
    file = entry / prepared.TRAIN
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert prepare(recipe) == [entry]
    assert file.read_bytes() == whole
    file.unlink()
    assert prepare(recipe) == [entry]
    assert file.read_bytes() == whole


@pytest.mark.parametrize("locks", [True, False])
def test_one_process_prepares_and_the_others_wait(
    locks: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no locks, the others wait for rank 0."""
    if not locks:

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        monkeypatch.setenv("RANK", "1")
    writes, entries = [], []
    begun, go_on, write = threading.Event(), threading.Event(), prepared._write

    def slow(folder: Path, *given: Any) -> None:
        writes.append(folder)
        begun.set()
        assert go_on.wait(30)
        write(folder, *given)

    monkeypatch.setattr(prepared, "_write", slow)
    made = load(recipe, SftRecipe, [])
    tokenizer = load_tokenizer(made.base)
    ranks = [
        threading.Thread(target=lambda: entries.extend(prepared.prepare(CHATS, made, tokenizer).train))
        for _ in range(3)
    ]
    for rank in ranks[:-1]:
        rank.start()
    if not locks:
        ranks[0].join(1)
        assert not writes
        monkeypatch.setenv("RANK", "0")
    ranks[-1].start()
    assert begun.wait(30)
    go_on.set()
    for rank in ranks:
        rank.join(60)
    assert len(entries) == 3
    assert len(set(entries)) == 1
    assert len(writes) == 1
    left = {path.name for path in (tmp_path / prepared.FOLDER).iterdir()}
    assert left - {f".{entries[0].name}.lock"} == {entries[0].name}


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        (signal.SIGKILL, 2),
    ],
    ids=str,
)
def test_a_command_cut_off_leaves_no_entry_and_the_next_one_makes_it(
    number: signal.Signals, processes: int, recipe: Path, tmp_path: Path
) -> None:
    import psutil

    data, cache = chats(tmp_path / "many.jsonl", 6000), tmp_path / prepared.FOLDER
    command = [sys.executable, "-m", "mixfuse", "data", "prepare", str(recipe), f"data={data}"]
    cut = subprocess.Popen(
        [*command, f"data_processes={processes}"], env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE
    )
    while not list(cache.glob(".*.partial/*.arrow")) and cut.poll() is None:
        time.sleep(0.02)
    assert cut.poll() is None, cut.stderr and cut.stderr.read()
    children = psutil.Process(cut.pid).children(recursive=True)
    if number is signal.SIGINT:
        os.killpg(cut.pid, number)  # as a terminal sends Ctrl-C
    else:
        cut.send_signal(number)
    _, said = cut.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not list(cache.glob("[!.]*"))
    if number is signal.SIGINT:
        assert cut.returncode == 130
        assert b"Traceback" not in said
        assert not list(cache.iterdir())
    (entry,) = prepare(recipe, f"data={data}")
    assert prepared.facts(entry)["train"] == 6000
    assert [path.name for path in cache.iterdir()] == [entry.name]


def test_an_error_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}] * 600 + [{"text": "c"}])
    done = mixfuse("data", "prepare", recipe, f"data={bad}", "data_processes=2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"mixfuse: error: {bad}:601: no chat")
    assert not list((tmp_path / prepared.FOLDER).iterdir())


def test_bad_rows_of_pairs_are_left_out_with_the_other_order(judge_recipe: Path, tmp_path: Path) -> None:
    lines = judge_recipe.with_name("pairs.jsonl").read_text().splitlines()
    bad = tmp_path / "pairs.jsonl"
    other = json.dumps({**json.loads(lines[9]), "protocol": "0" * 64})
    bad.write_text("\n".join([lines[0], "{", *lines[2:5], *lines[6:9], other, *lines[10:]]))
    overrides = [f"data={bad}", "evaluation=null", f"out={tmp_path / 'judge'}"]
    with pytest.raises(MixfuseError, match=r"pairs.jsonl:2: malformed JSON"):
        prepare_data(load(judge_recipe, JudgeRecipe, overrides))
    (entry,) = prepare_data(load(judge_recipe, JudgeRecipe, [*overrides, "on_bad_row=skip"])).train
    rows = prepared._table(entry, prepared.TRAIN)
    assert rows is not None
    kept = [json.loads(line)["id"] for number, line in enumerate(lines) if number not in (0, 1, 4, 5, 8, 9)]
    assert list(rows["id"]) == kept
    (line,) = [line for line in prepared.facts(entry)["lines"] if "left out" in line]
    assert "lacks the other order" in line
