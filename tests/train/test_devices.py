"""Each rank's tensors and groups are on its own GPU, with CUDA faked (`fake_cuda.py`); and what a rank finds itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.processes import worker

FAKE = Path(__file__).with_name("fake_cuda.py")


def on_two_gpus(folder: Path, *arguments: str | Path, **more: str) -> list[dict[str, Any]]:
    """Runs a mixfuse command as two ranks with a faked GPU each; returns what each rank's fake saw.

    Raises:
        AssertionError: A rank failed; what it wrote is the message.
    """
    folder.mkdir(exist_ok=True)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **more}
    place.setdefault("MASTER_PORT", str(harness.free_port()))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAKE), str(folder / f"{rank}.json"), *map(str, arguments)],
            env={**harness.ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-6000:] for text in said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def all_on_their_own(seen: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(seen):
        assert facts["devices"] == [rank], facts["devices"]
        assert {group["gpu"] for group in facts["groups"]} == {rank}, facts["groups"]
        assert facts["collectives"], "no collective was seen"
        assert not [entry for entry in facts["collectives"] if entry["gpu"] != rank]


@pytest.mark.zero3
@pytest.mark.parametrize("stage", ["sft", "judge"])
@pytest.mark.slow
def test_training_and_evaluation_are_on_the_ranks_gpu(stage: str, request: Any, tmp_path: Path) -> None:
    recipe = request.getfixturevalue(f"{stage}_recipe")
    steps = "optimizer={steps: 2, batch_size: 4, micro_batch: 2, learning_rate: 0.01, warmup_steps: 0}"
    more = ["lora={r: 4, alpha: 16, experts: auto}", "timeout_minutes=7", "packing=true"][: 3 if stage == "sft" else 2]
    if stage == "sft":
        # A GPU's own attention would be compiled for the fake one.
        more += [harness.evaluated(recipe, every=1), "attention=sdpa"]
    seen = on_two_gpus(tmp_path / "facts", "train", stage, recipe, f"out={tmp_path}/run", steps, "save_every=1", *more)
    all_on_their_own(seen)
    by = {entry["by"].partition(":")[0] for facts in seen for entry in facts["collectives"]}
    wanted = {"heartbeat.py", "guard.py", "evaluation.py", "checkpoint.py", "choose_experts.py", "worker.py"}
    assert wanted | {"trainers.py" if stage == "sft" else "one_pass_dpo.py"} <= by
    assert {group["timeout"] for facts in seen for group in facts["groups"]} == {7 * 60.0}


@pytest.mark.zero3
@pytest.mark.slow
def test_profiling_experts_is_on_the_ranks_gpu(sft_recipe: Path, tmp_path: Path) -> None:
    seen = on_two_gpus(tmp_path / "facts", "experts", "profile", sft_recipe, f"out={tmp_path}/run")
    all_on_their_own(seen)
    assert {group["timeout"] for facts in seen for group in facts["groups"]} == {30 * 60.0}, "the recipe's default"


@pytest.mark.zero3
def test_doctor_is_on_the_ranks_gpu(sft_recipe: Path, tmp_path: Path) -> None:
    seen = on_two_gpus(tmp_path / "facts", "doctor", sft_recipe, f"out={tmp_path}/run")
    all_on_their_own(seen)
    assert "nccl" in {group["backend"] for group in seen[0]["groups"]}


def test_a_rank_without_a_gpu_of_its_own_is_one_line(tmp_path: Path) -> None:
    reason = tmp_path / "reason.json"  # where torchrun looks for what it prints last
    place = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "FAKE_GPUS": "1"}
    command = [sys.executable, str(FAKE), str(tmp_path / "1.json"), "doctor"]
    done = subprocess.run(
        command,
        env={**harness.ENVIRONMENT, **place, "TORCHELASTIC_ERROR_FILE": str(reason)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    said = json.loads(reason.read_text())["message"]
    assert said.startswith("process 1 of this machine needs GPU 1, but there are 1; start at most one process a GPU")


def test_threads_are_of_the_cores_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert worker.threads(None, 1) == 1
        assert worker.threads(3, 1) == 3
    finally:
        os.sched_setaffinity(0, allowed)
    assert worker.threads(None, 1) == len(allowed)


@pytest.mark.parametrize("text", ["", "0", "65535", "http", "-1", "29501,29502"])
def test_ports_that_are_none_are_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.PORTS, text)
    with pytest.raises(MixfuseError, match="first of two ports"):
        worker.ports()


def test_a_users_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    worker.allocate_in_segments()
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    worker.allocate_in_segments()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
