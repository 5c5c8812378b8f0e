"""Export: any PEFT adapter of the base becomes a directory that says and does the same; anything else is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file, save_file
from train_harness import Run

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter as contract
from mixfuse.contracts import judge_protocol
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.export import export

WEIGHTS = contract.WEIGHTS

# PEFT converts per-expert factors to fused ones of twice the rank, and warns of the patterns it makes up for that.
loads_in_peft = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@loads_in_peft
@pytest.mark.parametrize(("attention", "experts"), [(True, True), (True, False), (False, True)])
def test_both_layouts_do_in_plain_peft_what_the_adapter_did(
    attention: bool, experts: bool, tiny_base: Path, peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = peft_adapter(attention=attention, experts=experts), tmp_path / "out"
    manifest = export(source, out, base=tiny_base)
    assert manifest.experts_trained == experts
    assert contract.verify(out, base=contract.fingerprint(tiny_base)) == manifest
    wanted = harness.logits(tiny_base, source)
    assert (wanted - harness.logits(tiny_base)).abs().max() > 0.1, "the adapter does too little to tell"
    torch.testing.assert_close(harness.logits(tiny_base, out), wanted, rtol=0, atol=1e-4)
    assert (out / "peft").is_dir() == experts
    if experts:
        torch.testing.assert_close(harness.logits(tiny_base, out / "peft"), wanted, rtol=0, atol=1e-5)


def test_experts_are_written_under_the_names_vllm_applies(adapter_directory: Path) -> None:
    config = json.loads((adapter_directory / contract.CONFIG).read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert config["target_parameters"] is None
    tensors = load_file(adapter_directory / WEIGHTS)
    shapes = {"w1": (64, 128), "w3": (64, 128), "w2": (128, 64)}
    for layer in range(2):
        for expert in range(4):
            for projection, (wide_in, wide_out) in shapes.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}"
                assert tensors[f"{stem}.lora_A.weight"].shape == (4, wide_in)
                assert tensors[f"{stem}.lora_B.weight"].shape == (wide_out, 4)


def test_each_experts_factors_are_its_own(adapter_directory: Path) -> None:
    """The per-expert product is the delta weight that PEFT computes for that expert, and no other."""
    fused, split = (load_file(folder / WEIGHTS) for folder in (adapter_directory / "peft", adapter_directory))
    stem, wrapper = "base_model.model.model.layers.1", "mlp.experts.base_layer"
    a = fused[f"{stem}.{wrapper}.lora_A.weight"].reshape(4, 4, 64)  # (E, r, in)
    b = fused[f"{stem}.{wrapper}.lora_B.weight"].reshape(256, 4, 4)  # (out, r, E)
    delta = torch.einsum("ore,eri->eoi", b, a)
    for expert in range(4):
        name = f"{stem}.block_sparse_moe.experts.{expert}"
        gate, up = (split[f"{name}.{w}.lora_B.weight"] @ split[f"{name}.{w}.lora_A.weight"] for w in ("w1", "w3"))
        torch.testing.assert_close(torch.cat([gate, up]), delta[expert])


@loads_in_peft
def test_an_exported_directory_exports_again(adapter_directory: Path, tiny_base: Path, tmp_path: Path) -> None:
    again = export(adapter_directory, tmp_path / "again")
    assert again.revision == contract.read_manifest(adapter_directory).revision
    # The per-expert files alone, as someone else would publish them.
    published = tmp_path / "published"
    published.mkdir()
    for name in (contract.CONFIG, WEIGHTS):
        shutil.copy(adapter_directory / name, published)
    manifest = export(published, tmp_path / "from_published", base=tiny_base)
    assert manifest.experts_trained
    wanted = harness.logits(tiny_base, adapter_directory / "peft")
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "from_published"), wanted, rtol=0, atol=1e-4)


def test_a_judge_keeps_its_role_and_the_protocol_it_was_trained_with(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    judge = export(peft_adapter(), tmp_path / "judge", base=tiny_base, role="judge")
    assert judge.judge_protocol == judge_protocol.describe()
    old = tmp_path / "judge" / contract.MANIFEST
    old.write_text(json.dumps(json.loads(old.read_text()) | {"judge_protocol": {"version": "0"}}))
    again = export(tmp_path / "judge", tmp_path / "again")
    assert (again.role, again.judge_protocol) == ("judge", {"version": "0"})


@pytest.mark.zero3
@loads_in_peft
def test_a_trained_run_exports_with_its_recipe_and_metrics(sft_by_two: Run, tiny_base: Path, tmp_path: Path) -> None:
    manifest = export(sft_by_two.out, tmp_path / "out")
    assert manifest.role == "domain"
    assert manifest.recipe == sft_by_two.record["recipe"]
    assert manifest.metrics == sft_by_two.record["metrics"]
    assert f"revision {manifest.revision}" in (tmp_path / "out" / "README.md").read_text()
    wanted = harness.logits(tiny_base, sft_by_two.out / "adapter")
    assert (wanted - harness.logits(tiny_base)).abs().max() > 0.1
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), wanted, rtol=0, atol=1e-4)


def _as_run(peft: Path, base: Path, run: Path, **record: Any) -> Path:
    """A finished run's folder around an adapter that PEFT saved."""
    shutil.copytree(peft, run / "adapter")
    (run / "recipe.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"base": str(base), "role": "judge", **record}))
    return run


def test_a_runs_calibration_and_data_go_into_the_manifest_and_on_with_it(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    data = [{"name": "pairs.jsonl", "sha256": "ab" * 32, "rows": 12, "licence": "CC-BY-4.0"}]
    calibration = {"temperature": 1.7, "tie_margin": 0.05}
    run = _as_run(peft_adapter(), tiny_base, tmp_path / "run", calibration=calibration, training_data=data)
    manifest = export(run, tmp_path / "out")
    assert manifest.calibration == judge_protocol.Calibration(temperature=1.7, tie_margin=0.05)
    assert [entry.model_dump() for entry in manifest.training_data] == data
    again = export(tmp_path / "out", tmp_path / "again")
    assert (again.calibration, again.training_data) == (manifest.calibration, manifest.training_data)
    # A calibration is a judge's.
    assert export(tmp_path / "out", tmp_path / "domain", role="domain").calibration is None


def test_a_run_whose_calibration_is_none_is_refused(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    run = _as_run(peft_adapter(), tiny_base, tmp_path / "run", calibration={"temperature": -1})
    with pytest.raises(MixfuseError, match=r"run: 'calibration\.temperature'.*greater than 0"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_hash_finds_a_base_that_differs_in_one_number(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = Path(shutil.copytree(tiny_base, tmp_path / "base")), tmp_path / "out"
    assert main(["adapter", "export", str(peft_adapter()), str(out), "--base", str(base), "--full-hash"]) == 0
    assert main(["adapter", "verify", str(out), "--full-hash"]) == 0
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 4] ^= 1  # where no sample is taken
    weights.write_bytes(content)
    assert main(["adapter", "verify", str(out)]) == 0
    assert main(["adapter", "verify", str(out), "--full-hash"]) == 2
    assert "another base model (its tensors differ)" in capsys.readouterr().err


def test_keygen_sign_and_verify_from_the_command_line(
    adapter_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(adapter_directory, tmp_path / "adapter"))
    key = tmp_path / "key"
    assert main(["adapter", "keygen", str(key)]) == 0
    assert main(["adapter", "verify", str(directory), "--public-key", f"{key}.pub"]) == 2
    assert "is not signed" in capsys.readouterr().err
    assert main(["adapter", "sign", str(directory), "--key", str(key)]) == 0
    assert main(["adapter", "verify", str(directory), "--public-key", f"{key}.pub"]) == 0
    told = capsys.readouterr()
    assert "signed with key" in told.out
    secret = key.read_text().splitlines()[1]
    assert secret not in told.out + told.err
    assert main(["adapter", "keygen", str(key)]) == 2
    assert capsys.readouterr().err.startswith("mixfuse: error: ")


@pytest.fixture
def copy(peft_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A PEFT adapter that a test may spoil."""
    return Path(shutil.copytree(peft_adapter(), tmp_path / "copy"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _configure(folder: Path, **keys: Any) -> None:
    path = folder / contract.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _nan(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _untrained(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()


def _partitioned(tensors: dict[str, Any]) -> None:
    for name in tensors:
        tensors[name] = torch.empty(0)


def _narrower(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :32].contiguous()


def _widowed(tensors: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if ".experts.base_layer.lora_B" in name)]


def _router(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.gate.lora_A.weight"] = torch.ones(4, 64)
    tensors["base_model.model.model.layers.0.mlp.gate.lora_B.weight"] = torch.ones(4, 4)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors": (lambda folder: _edit(folder, dict.clear), "is empty"),
    "partitions": (lambda folder: _edit(folder, _partitioned), "is empty"),
    "NaN": (lambda folder: _edit(folder, _nan), "NaN or infinity"),
    "untrained": (lambda folder: _edit(folder, _untrained), "every lora_B is zero"),
    "another width": (lambda folder: _edit(folder, _narrower), "q_proj.lora_A.weight has shape"),
    "router": (lambda folder: _edit(folder, _router), "mlp.gate.*not a part of Mixtral for which vLLM serves"),
    "another rank": (lambda folder: _configure(folder, r=8), "does not fit rank 8"),
    "no rank": (lambda folder: _configure(folder, r=None), "has no rank"),
    "DoRA": (lambda folder: _configure(folder, use_dora=True), "DoRA"),
    "rank pattern": (lambda folder: _configure(folder, rank_pattern={"q_proj": 8}), "q_proj.*does not fit rank 8"),
    "no alpha": (lambda folder: _configure(folder, lora_alpha=None), "has no 'lora_alpha'"),
    "half a pair": (lambda folder: _edit(folder, _widowed), "has no .*lora_B.weight"),
    "no LoRA": (lambda folder: _configure(folder, peft_type="IA3"), "IA3"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a whole safetensors file"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickled .bin files are refused"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_adapter_is_refused_and_nothing_written(
    case: str, copy: Path, tiny_base: Path, tmp_path: Path
) -> None:
    spoil, message = SPOILED[case]
    spoil(copy)
    with pytest.raises(MixfuseError, match=message):
        export(copy, tmp_path / "out", base=tiny_base)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


@pytest.mark.parametrize("experts", [2, 3])
def test_an_adapter_of_a_base_with_other_experts_is_refused(
    experts: int, peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from mixfuse.train.model.embedded_base import build

    build(tmp_path / "base", tiny=True, experts=experts)
    with pytest.raises(MixfuseError, match="another base model"):
        export(peft_adapter(), tmp_path / "out", base=tmp_path / "base")


def test_a_missing_source_base_or_place_is_named(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(MixfuseError, match="no such run or adapter folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(MixfuseError, match="name it with --base"):
        export(peft_adapter(), tmp_path / "out", base=tmp_path / "nowhere")
    with pytest.raises(MixfuseError, match="exists already"):
        export(peft_adapter(), tmp_path, base=tiny_base)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(MixfuseError, match="has not finished; run its train command again"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    mount = tmp_path / "full"
    arguments = ["adapter", "export", str(peft_adapter()), str(mount / "out"), "--base", str(tiny_base)]
    done = harness.on_full_disk(mount, [sys.executable, "-m", "mixfuse", *arguments])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"mixfuse: error: no disk space left to write {mount / 'out'}")
    assert "Traceback" not in done.stderr
    assert not done.stdout.strip(), "files were left on the full disk"
