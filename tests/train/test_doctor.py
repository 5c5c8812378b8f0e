"""`mixfuse doctor`: every check a line, what fails with how to mend it, alone and in several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import train_harness as harness

from mixfuse.train.launching import doctor
from mixfuse.train.launching.doctor import Machine


def report(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, str]]:
    facts = json.loads(done.stdout.splitlines()[-1])
    return {check["name"]: check for check in facts["checks"]} | {"ok": facts["ok"]}


def test_alone_it_says_plainly_that_there_is_no_gpu() -> None:
    done = harness.mixfuse("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU: CPU run" in done.stdout
    assert done.stdout.splitlines()[-1] == "all is well"


def test_what_fails_is_named_with_how_to_mend_it(sft_recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = harness.mixfuse("doctor", sft_recipe, f"base={empty}", f"out={tmp_path}/run", "--nodes", "2", "--json")
    assert done.returncode == 1, done.stderr
    found = report(done)
    assert found["ok"] is False
    assert found["base"]["status"] == "FAIL"
    assert "is not a model folder on this machine" in found["base"]["found"]
    assert found["base"]["mend"]
    assert (found["machines"]["status"], found["machines"]["found"].partition(":")[0]) == ("FAIL", "1 of 2")


def test_files_that_training_would_miss_are_found(sft_recipe: Path, tmp_path: Path) -> None:
    missing, empty, kept = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl", tmp_path / "kept.jsonl"
    empty.touch()
    kept.write_text("{}\n")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "mixtral"')
    done = harness.mixfuse(
        "doctor", sft_recipe, f"base={base}", f"out={tmp_path}/run", f"data=[{missing}, {empty}, {tmp_path}, {kept}]",
        f"evaluation={{data: {tmp_path}/held-out.jsonl}}", f"deepspeed={tmp_path}/zero3.json", "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = report(done)
    assert {name for name in ("base", "data", "deepspeed") if found[name]["status"] == "FAIL"} == {
        "base", "data", "deepspeed",
    }  # fmt: skip
    for problem in (f"{missing}: no such file", f"{empty} is empty", f"{tmp_path}: the folder holds", "held-out.jsonl"):
        assert problem in found["data"]["found"]
    assert "kept" not in found["data"]["found"]
    assert found["data"]["mend"]
    assert "not valid JSON" in found["base"]["found"]


def test_two_processes_compare_and_reach_each_other(sft_recipe: Path, tmp_path: Path) -> None:
    command = ["launch", "--local", "2", "doctor", sft_recipe, f"out={tmp_path}/run", "--nodes", "1", "--json"]
    done = harness.mixfuse(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report(done)
    for name in ("machines", "shared out", "same base", "gloo all-reduce", "disk"):
        assert found[name]["status"] == "ok", found[name]
    assert found["gloo all-reduce"]["found"].startswith("2 processes, 64 MiB at ")
    assert not list(tmp_path.glob(".mixfuse-doctor-*")), "it left a file behind"


def test_an_out_that_is_not_shared_is_found(sft_recipe: Path, tmp_path: Path) -> None:
    """The second process has a file system of its own under that path, as another machine would."""
    unshare = harness.mount_namespaces()
    out, port = tmp_path / "out", str(harness.free_port())
    out.mkdir()
    look = [sys.executable, "-m", "mixfuse", "doctor", str(sft_recipe), f"out={out}/run", "--json"]
    commands = [look, [unshare, "-Urm", "sh", "-c", f'mount -t tmpfs none {out} && exec "$@"', "sh", *look]]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            env={**harness.ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 0]
    check = next(c for c in json.loads(said[0].splitlines()[-1])["checks"] if c["name"] == "shared out")
    assert check["status"] == "FAIL"
    assert "put `out` on it" in check["mend"]


def _machine(host: str, rank: int, **differing: object) -> Machine:
    usual = {
        "versions": {"torch": "2.13.0"},
        "gpus": ["H100"] * 8,
        "gpu_memory": 1,
        "driver": "570",
        "memory": 1,
        "infiniband": 8,
    }
    return Machine(host=host, rank=rank, **(usual | differing))  # type: ignore[arg-type]


def test_machines_that_differ_are_named() -> None:
    same = [_machine("a", 0), _machine("a", 1), _machine("b", 2)]
    assert [check.status for check in doctor._compared(same, 2)] == ["ok", "ok"]
    other = [_machine("a", 0), _machine("b", 1, versions={"torch": "2.12.0"}, driver="560", infiniband=0)]
    by_name = {check.name: check for check in doctor._compared(other, None)}
    assert by_name["torch version"].found == "2.13.0 on a, 2.12.0 on b"
    assert by_name["driver"].status == "FAIL"
    assert "no active InfiniBand port on b" in by_name["interconnect"].found


def test_a_recipe_that_is_wrong_is_one_line(sft_recipe: Path) -> None:
    done = harness.mixfuse("doctor", sft_recipe, "optimizer.momentum=1")
    assert done.returncode == 2
    assert "unknown key 'optimizer.momentum'" in done.stderr


@pytest.mark.parametrize("name", ["disk", "base"])
def test_checks_of_a_recipe_are_left_out_without_one(name: str) -> None:
    assert name not in {check.name for check in doctor.local_checks(None)}


def test_it_says_which_attention_a_run_takes(sft_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mixfuse.contracts.strict_yaml import load
    from mixfuse.train.model import attention
    from mixfuse.train.recipe import SftRecipe

    def found(*overrides: str) -> tuple[str, str]:
        (check,) = doctor._attention(load(sft_recipe, SftRecipe, ["packing=true", *overrides]))
        return check.status, check.found

    assert found() == ("ok", "varlen: each document by itself")
    status, why = found("attention=flash_attention_2")
    assert status == "FAIL" and "needs a GPU and dtype bfloat16; use auto, which is varlen here" in why
    assert found("attention=sdpa", "max_length=16384")[0] == "note"
    assert doctor._attention(None) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert found("dtype=bfloat16") == ("ok", "flash_attention_2: flash-attn is installed")
    assert "flash_attention_2 for packed chats" in doctor._attention(None)[0].found
