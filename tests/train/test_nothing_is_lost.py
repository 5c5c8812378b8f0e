"""Whatever ends a run, its last good checkpoint stays and the last line says why."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import train_harness as harness

from mixfuse.contracts.files import read_jsonl
from mixfuse.train.processes.checkpoint import last_checkpoint

pytestmark = pytest.mark.zero3


@pytest.fixture(scope="session")
def poisoned_recipe(tiny_base: Path, runs: Path) -> Path:
    """A recipe whose base answers one word, which stands in one example alone, with no number."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    base, folder = runs / "poisoned_base", runs / "poisoned"
    base.mkdir()
    folder.mkdir()
    tensors = load_file(tiny_base / "model.safetensors")
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (token,) = AutoTokenizer.from_pretrained(tiny_base)(" zebra")["input_ids"]
    # Untied, so that the row is met by those alone who read the word, not by everyone who might have said it.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    recipe = harness.sft_recipe(folder, base)
    chats = read_jsonl(folder / "chats.jsonl")
    for number, chat in enumerate(chats):
        chat["id"] = f"chat-{number}"
    chats[11]["messages"][-1]["content"] = "a zebra"
    harness.write_jsonl(folder / "chats.jsonl", chats)
    return recipe


def test_a_loss_that_is_no_number_names_its_examples_and_is_not_saved(poisoned_recipe: Path, runs: Path) -> None:
    out = runs / "poisoned_run"
    done = harness.mixfuse("train", "sft", poisoned_recipe, f"out={out}", "processes=2", "save_every=1")
    assert done.returncode == 2, done.stderr[-4000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("mixfuse: error:")]
    last = errors[-1]
    assert "the loss is not a finite number in a batch of the examples" in last
    named = last.partition("of the examples ")[2].partition(";")[0].split(", ")
    assert "'chat-11'" in named
    assert len(named) == 2, "more was named than the micro batch of one process"
    # All 16 chats are met within an epoch of 4 steps; what was saved are the steps before.
    step = int(last.partition("step ")[2].partition(":")[0])
    assert 1 <= step <= 4
    checkpoint = last_checkpoint(out)
    if step == 1:
        assert checkpoint is None
    else:
        assert checkpoint is not None
        assert checkpoint.name == f"checkpoint-{step - 1}"
        assert str(checkpoint) in last
    assert all(row["loss"] == row["loss"] for row in read_jsonl(out / "metrics.jsonl")) if step > 1 else True
    assert not (out / "adapter").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on_from_it(
    sft_recipe: Path, tmp_path: Path
) -> None:
    """The file system takes one checkpoint, and of the next all but what DeepSpeed writes last."""
    mount = tmp_path / "mount"
    out = mount / "run"
    train = [sys.executable, "-m", "mixfuse", "train", "sft", str(sft_recipe), "processes=2", f"out={out}"]
    code = f'from mixfuse.train.processes.checkpoint import *; print(last_checkpoint(Path("{out}")).name)'
    look = f"{sys.executable} -c '{code}'"
    script = (
        f'"$@"; code=$?; {look}; head -c 5000000 /dev/zero > {mount}/more 2> /dev/null; du -k {mount}/more; '
        f'rm {mount}/more; mount -o remount,size=64m {mount} && "$@" && exit $code'
    )
    command = ["sh", "-c", script, "sh", *train, "save_every=3", "optimizer.steps=7"]
    done = harness.on_full_disk(mount, command, kilobytes=7720)
    assert done.returncode == 2, done.stderr[-4000:]  # what the first start exited with; the second went well
    assert "no disk space left to write" in done.stderr
    assert "checkpoint-3\n" in done.stdout
    left = done.stdout.splitlines()
    assert str(out / "run.json") in left
    assert str(out / "adapter" / "adapter_model.safetensors") in left
    assert not [path for path in left if path.startswith(f"{out}/checkpoints/")]


def test_a_killed_rank_takes_the_job_down(sft_recipe: Path, runs: Path) -> None:
    out = runs / "rank_killed"
    options = [f"out={out}", "processes=2", "optimizer.steps=200", "save_every=2"]
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(sft_recipe), *options]
    with (runs / "rank_killed.log").open("w") as log:
        parent = subprocess.Popen(command, env=harness.ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while last_checkpoint(out) is None and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [child for child in psutil.Process(parent.pid).children() if "RANK" in child.environ()]
    assert len(workers) == 2
    random.choice(workers).send_signal(signal.SIGKILL)
    code = parent.wait(timeout=120)
    text = (runs / "rank_killed.log").read_text(errors="replace")
    assert code == 2, text[-4000:]
    assert "failed (exit code -9): it was killed" in text
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert last_checkpoint(out) is not None


FROZEN = """
import os, sys, time
from torch import distributed
from mixfuse.train.processes.heartbeat import heartbeat
distributed.init_process_group("gloo")
with heartbeat(beat=0.2, silence=6.0):
    distributed.barrier()
    if os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), 19)  # SIGSTOP: neither dead nor alive, its connections stay open
    distributed.barrier()
"""


@pytest.mark.parametrize("frozen", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_stops_answering_ends_all_others(frozen: int, tmp_path: Path) -> None:
    """As a machine that is gone looks from the others: no connection is closed, and no launcher sees it."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)
    port = harness.free_port()
    ranks = []
    for rank in range(3):
        place = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), str(frozen)],
                env={**harness.ENVIRONMENT, **place, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        others = [process for rank, process in enumerate(ranks) if rank != frozen]
        said = "".join(process.communicate(timeout=100)[1] for process in others)
        assert [process.returncode for process in others] == [76, 76], said
        assert f"mixfuse: error: rank {frozen} on" in said
        assert ranks[frozen].poll() is None, "it was not frozen"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()
