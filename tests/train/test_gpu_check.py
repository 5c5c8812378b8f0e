"""`scripts/gpu-check` on a CPU: the comparisons hold on small sizes, and each of them can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks import __main__ as gpu_check
from gpu_checks.checking import Report, error, peak_bytes

from mixfuse.train.model import expert_products, packed_attention

PROJECT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FLEX = "ignore:flex_attention called without torch.compile:UserWarning"  # compiled, it needs a compiler on a CPU


def front(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROJECT / "scripts" / "gpu-check", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def figures(line: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    return [row for row in line["figures"] if all(row.get(key) == value for key, value in keys.items())]


@pytest.fixture(scope="module")
def block() -> dict[str, Any]:
    return gpu_check.run("moe-block", CPU, small=True)


def test_all_paths_of_a_moe_block_agree_with_one_expert_at_a_time(block: dict[str, Any]) -> None:
    """Forward and all gradients; the tolerance and its reason are in `moe_block.py`."""
    assert block["result"] == "ok", block["why"]
    cases = {(row["T"], row["routing"], row["r"]) for row in block["figures"]}
    assert cases == {(T, kind, r) for T in (1, 96) for kind in ("uniform", "one", "half") for r in (4, 16)}
    for case in cases:
        assert [row["path"] for row in block["figures"] if (row["T"], row["routing"], row["r"]) == case] == [
            "grouped",
            "per_expert",
            "peft",
        ]
    assert all(row["error"] < 1e-5 and row["step_tflops"] > 0 for row in block["figures"])


def test_the_grouped_path_holds_what_the_plan_says(block: dict[str, Any]) -> None:
    """Storages counted on a CPU; the plan's formula is the GPU's, whose path this is."""
    for row in figures(block, path="grouped", T=96):
        assert row["planned_peak_bytes"] * 0.8 < row["peak_bytes"] < row["planned_peak_bytes"] * 1.1


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_wrong_gradient_fails_the_block(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    whole = expert_products._Lora.gradients

    def halved(self: Any) -> Any:
        a, b = whole(self)
        wrong = (self._places == {None: 0}) is grouped
        return (a / 2, b) if wrong else (a, b)

    monkeypatch.setattr(expert_products._Lora, "gradients", halved)
    line = gpu_check.run("moe-block", CPU, small=True)
    assert line["result"] == "failed"
    path = "grouped" if grouped else "per_expert"
    assert f"{path}, T 96, uniform, r 4: the error of down_proj.A is 0.5" in line["why"]
    assert ("per_expert, T 96" if grouped else "grouped, T 96") not in line["why"]


@pytest.mark.filterwarnings(FLEX)
def test_packed_chats_are_as_alone_in_each_attention() -> None:
    line = gpu_check.run("packed-attention", CPU, small=True)
    assert line["result"] == "ok", line["why"]
    assert {row["what"] for row in line["figures"]} == {"sdpa", "varlen", "flex", "fastest"}
    assert all(row["error"] < 1e-5 for row in line["figures"] if "error" in row)
    assert "flash_attn" in line["not_run"]


@pytest.mark.filterwarnings(FLEX)
def test_chats_that_see_one_another_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = packed_attention.varlen

    def together(q: Any, k: Any, v: Any, ends: torch.Tensor, longest: int) -> torch.Tensor:
        return apart(q, k, v, torch.tensor([0, len(q)]), len(q))

    monkeypatch.setattr(packed_attention, "varlen", together)
    line = gpu_check.run("packed-attention", CPU, small=True)
    assert line["result"] == "failed" and "varlen: the error of output" in line["why"]
    assert "sdpa" not in line["why"]


def test_the_judges_margins_need_a_float32_head() -> None:
    line = gpu_check.run("judge-head", CPU, small=True)
    assert line["result"] == "ok", line["why"]
    (rough,), (exact,) = figures(line, what="margin", dtype="bfloat16"), figures(line, what="margin", dtype="float32")
    assert rough["mean_logit"] == pytest.approx(20, abs=0.5)
    # A step of 0.125 nats at margins of 0.05: most of the even verdicts are rounding alone.
    assert rough["exactly_even"] > 0.1 and rough["largest_error_nats"] > 0.05
    assert exact["exactly_even"] == 0 and exact["largest_error_nats"] < 1e-3
    (tiles,) = figures(line, what="chunked")
    assert tiles["largest_error_nats"] < 1e-4 and tiles["gradient_error"] < 1e-5


@pytest.fixture(scope="module")
def layers() -> dict[str, Any]:
    return gpu_check.run("four-layers", CPU, small=True)


@pytest.mark.zero3
@pytest.mark.slow
def test_a_small_base_trains_beside_the_plan(layers: dict[str, Any]) -> None:
    assert layers["result"] == "ok", layers["why"]
    (row,) = figures(layers, what="training")
    assert row["steps"] == 6 and row["last_loss"] < row["first_loss"] and row["tokens_per_second"] > 0
    assert row["planned_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05)


@pytest.mark.zero3
@pytest.mark.slow
def test_checkpointing_changes_neither_loss_nor_gradients(layers: dict[str, Any]) -> None:
    (row,) = figures(layers, what="without checkpointing")
    assert row["loss_difference"] < 1e-4 and row["grad_norm_difference"] < 1e-4
    (with_it,) = figures(layers, what="training")
    assert row["peak_bytes"] > with_it["peak_bytes"]


@pytest.mark.zero3
@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses_and_adapter(layers: dict[str, Any]) -> None:
    (row,) = figures(layers, what="resumed")
    assert row["steps"] == 6 and row["after"] == 2
    assert row["loss_difference"] < 1e-4 and row["adapter_difference"] < 1e-4


def test_quantised_weights_are_as_wrong_as_their_steps_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks import loading

    report = Report(CPU, small=True)
    loading.weights(report)
    assert not report.failures
    (eight,), (four,) = ([row for row in report.rows if row["what"] == name] for name in ("int8", "nf4"))
    assert 0.003 < eight["error"] < 0.008 and 0.06 < four["error"] < 0.12
    assert eight["bytes"] < 0.27 * eight["bytes_without"] and four["bytes"] < 0.15 * four["bytes_without"]
    monkeypatch.setattr("mixfuse.train.model.quantised.NF4", (-1.0,) * 8 + (1.0,) * 8)
    loading.weights(report)
    assert [failure.partition(":")[0] for failure in report.failures] == ["nf4"]


@pytest.mark.slow
@pytest.mark.zero3
def test_offloaded_training_has_the_same_losses() -> None:
    line = gpu_check.run("loading", CPU, small=True)
    assert line["result"] == "ok", line["why"]
    (row,) = figures(line, what="CPU offload")
    assert row["loss_difference"] < 1e-5
    assert figures(line, what="loading")[0]["gb_per_second"] > 0
    for kind in ("int8", "nf4"):
        (row,) = figures(line, what=f"training with experts in {kind}")
        assert 0 < row["loss_difference"] < 0.05


def test_torch_alone_is_enough_for_the_kernels(tmp_path: Path) -> None:
    """Where neither PEFT nor transformers nor pydantic is installed, ours is checked and the rest says why not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('peft', 'transformers', 'trl', 'deepspeed', 'pydantic', 'safetensors', 'vllm'):\n"
        "    sys.modules[name] = None\n"
    )
    done = front("--small", "moe-block", "judge-head", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    block, head = (json.loads(line) for line in done.stdout.splitlines())
    assert block["result"] == head["result"] == "ok"
    assert {row["path"] for row in block["figures"]} == {"grouped", "per_expert"}
    assert "peft" in block["not_run"]["peft"] and "trl" in head["not_run"]["chunked"]
    assert all(row["planned_peak_bytes"] is None for row in block["figures"])
    assert block["device"] == {"kind": "cpu", "torch": torch.__version__}


def test_the_front_lists_its_checks_and_refuses_others() -> None:
    listed = front("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(gpu_check.CHECKS)
    refused = front("moe-blok")
    assert refused.returncode == 2 and "there is no check 'moe-blok'" in refused.stderr and not refused.stdout


def test_a_check_that_breaks_or_has_no_time_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_checks import judge_head

    def broken(_: object) -> None:
        raise RuntimeError("CUDA error:\n out of luck")

    monkeypatch.setattr(judge_head, "check", broken)
    assert gpu_check.main(["--small", "judge-head", "judge-head"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["result"] for line in lines] == ["failed"] * 2
    assert lines[0]["why"] == "RuntimeError: CUDA error: out of luck"
    assert gpu_check.main(["--small", "--minutes", "-1", "judge-head"]) == 0
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert line["result"] == "skipped" and "minutes are over" in line["why"]


def test_ctrl_c_leaves_what_was_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_checks import judge_head, moe_block

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge_head, "check", lambda _: None)
    monkeypatch.setattr(moe_block, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--small", "judge-head", "moe-block"])
    assert json.loads(capsys.readouterr().out)["name"] == "judge-head"


def test_memory_that_was_there_before_is_not_counted() -> None:
    held = torch.zeros(1000)
    assert peak_bytes(lambda: held.view(10, 100).add(1).sum(), CPU) == 4004
    assert error(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)


@pytest.mark.slow
@pytest.mark.zero3
@pytest.mark.engine
def test_vllm_serves_adapters_of_experts_as_peft_and_each_answer_is_of_its_revision() -> None:
    line = gpu_check.run("vllm-adapters", CPU, small=True)
    assert line["result"] == "ok", line["why"]
    assert [row["parity"]["max_abs_logprob_difference"] < 1e-3 for row in figures(line, what="parity")] == [True, True]
    (swaps,) = figures(line, what="swaps under load")
    assert swaps["answers"] > swaps["swaps"] and swaps["failed"] == swaps["wrong"] == 0
    assert "FP8 base" in line["not_run"]


def test_an_answer_of_another_revision_fails_the_swaps() -> None:
    from gpu_checks.vllm_adapters import _swaps_row

    report, known = Report(CPU, small=True), {"one": [-1.0, -2.0], "two": [-3.0, -2.0]}
    right: list[Any] = [("one", [-1.0, -2.0], 0.1), ("two", [-3.0, -2.0], 0.1)]
    assert _swaps_row(report, right, known)["wrong"] == 0 and not report.failures
    row = _swaps_row(report, [*right, ("one", [-3.0, -2.0], 0.1), ("three", [-1.0, -2.0], 0.1)], known)
    assert (row["wrong"], row["failed"], row["answers"]) == (2, 0, 4)
    assert _swaps_row(report, [*right, ("one", RuntimeError("gone"), 0.1)], known)["failed"] == 1
    same = {"one": [-1.0, -2.0], "two": [-1.0, -2.0]}
    _swaps_row(report, right[:1], same)
    assert any("nothing is told apart" in failure for failure in report.failures)
