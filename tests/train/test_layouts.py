"""Every layout a Mixtral LoRA comes in is read, and what is written does the same in plain PEFT."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.layouts import fuse

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

STEM = "base_model.model.model.layers"
SIZES = {"w1": (64, 128), "w2": (128, 64), "w3": (64, 128)}  # in, out


def per_expert(out: Path, base: Path, modules: list[str], *, r: int = 4, rslora: bool = False) -> Path:
    """An adapter as PEFT with transformers 4 saved it: a module for each of an expert's matrices, each with its own A.

    Args:
        out: The folder.
        base: The base model.
        modules: "LAYER.EXPERT.w1" and the like.
        r: The rank.
        rslora: Whether the scale is alpha / √r.
    """
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module in modules:
        layer, expert, projection = module.split(".")
        wide_in, wide_out = SIZES[projection]
        stem = f"{STEM}.{layer}.block_sparse_moe.experts.{expert}.{projection}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(r, wide_in, generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(wide_out, r, generator=generator) * 0.1
    out.mkdir()
    save_file(tensors, out / contract.WEIGHTS)
    targets = sorted({module.rsplit(".", 1)[-1] for module in modules})
    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=8, target_modules=targets, use_rslora=rslora).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (out / contract.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return out


EVERY = [f"{layer}.{expert}.{projection}" for layer in range(2) for expert in range(4) for projection in SIZES]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_transformers_4_is_exported(rslora: bool, tiny_base: Path, tmp_path: Path) -> None:
    source = per_expert(tmp_path / "old", tiny_base, EVERY, rslora=rslora)
    manifest = export(source, tmp_path / "out")
    assert manifest.experts_trained
    expected = harness.logits_of_weights(tiny_base, harness.deltas(source, 8 / math.sqrt(4) if rslora else 8 / 4))
    assert (expected - harness.logits(tiny_base)).abs().max() > 0.1, "the adapter does too little to tell"
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), expected, rtol=0, atol=1e-4)
    # w1 and w3 have an A each, which PEFT's fused layout has no place for.
    assert not (tmp_path / "out" / "peft").exists()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of the layer without any; their B starts at zero
@pytest.mark.parametrize(
    "modules", [["0.1.w1", "0.1.w3", "1.3.w2"], ["1.0.w2"], ["0.2.w1"]], ids=["some", "only w2", "only w1"]
)
def test_experts_and_projections_that_were_left_out_are_written_as_zeros(
    modules: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    """vLLM takes all of a layer's experts or none (`pack_moe`), and PEFT no w1 without its w3."""
    source = per_expert(tmp_path / "old", tiny_base, modules)
    export(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / contract.WEIGHTS)
    layers = {module.split(".")[0] for module in modules}
    assert len(tensors) == len(layers) * 4 * 3 * 2
    trained = {f"{STEM}.{m.replace('.', '.block_sparse_moe.experts.', 1)}.lora_B.weight" for m in modules}
    assert {name for name, tensor in tensors.items() if ".lora_B." in name and tensor.any()} == trained
    expected = harness.logits_of_weights(tiny_base, harness.deltas(source))
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_what_peft_saves_after_loading_an_adapter_directory_is_read_again(
    adapter_directory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """PEFT fuses the per-expert factors it loads: gate and up of twice the rank, by patterns in the config."""
    model = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tiny_base), str(adapter_directory))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / contract.CONFIG).read_text())
    assert config["rank_pattern"], "PEFT saves no patterns any more; nothing is tested here"
    manifest = export(tmp_path / "saved", tmp_path / "out", base=tiny_base)
    assert manifest.rank == 8
    expected = harness.logits(tiny_base, adapter_directory / "peft")
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_that_differ_by_module_become_one(rslora: bool, tiny_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.experts.down_proj": 8},
        alpha_pattern={"v_proj": 32, "mlp.experts.gate_up_proj": 2},
        use_rslora=rslora,
    )
    model: Any = get_peft_model(MixtralForCausalLM.from_pretrained(tiny_base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([harness.PROBE])).logits
    manifest = export(tmp_path / "saved", tmp_path / "out", base=tiny_base)
    assert manifest.rank == 8
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_fusing_is_the_inverse_of_splitting(adapter_directory: Path, tiny_base: Path) -> None:
    fused = fuse(family_of(tiny_base), load_file(adapter_directory / contract.WEIGHTS))
    assert fused is not None
    expected = load_file(adapter_directory / "peft" / contract.WEIGHTS)
    assert fused.keys() == expected.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in expected.items())


def test_per_expert_files_alone_are_given_their_fused_ones_again(
    adapter_directory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "published").mkdir()
    for name in (contract.CONFIG, contract.WEIGHTS):
        (tmp_path / "published" / name).write_bytes((adapter_directory / name).read_bytes())
    export(tmp_path / "published", tmp_path / "out", base=tiny_base)
    expected = harness.logits(tiny_base, adapter_directory / "peft")
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out" / "peft"), expected, rtol=0, atol=1e-5)


def test_a_directory_of_the_first_schema_is_upgraded_by_export(
    adapter_directory: Path, tmp_path: Path, first_schema: Callable[[Path], Path]
) -> None:
    old = first_schema(adapter_directory)
    manifest = export(old, tmp_path / "out")
    assert manifest.revision == contract.read_manifest(adapter_directory).revision
    assert json.loads((tmp_path / "out" / contract.MANIFEST).read_text())["schema_version"] == contract.SCHEMA_VERSION
    assert manifest.base.weight_files


@pytest.fixture
def first_schema(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies an adapter directory and writes its manifest as the first version of mixfuse did."""
    import shutil

    def write(directory: Path) -> Path:
        old = Path(shutil.copytree(directory, tmp_path / "first"))
        data = json.loads((old / contract.MANIFEST).read_text())
        data = {key: data[key] for key in data.keys() - {"calibration", "training_data", "signature"}}
        data["base"] = {key: data["base"][key] for key in ("config", "tokenizer", "chat_template", "weights")}
        (old / contract.MANIFEST).write_text(json.dumps(data | {"schema_version": 1}))
        return old

    return write


def test_an_expert_that_the_base_does_not_have_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    source = per_expert(tmp_path / "old", tiny_base, ["0.4.w1", "0.4.w2", "0.4.w3"])
    with pytest.raises(MixfuseError, match=r"experts\.4\..*belongs to another base model"):
        export(source, tmp_path / "out")
