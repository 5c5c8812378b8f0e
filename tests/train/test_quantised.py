"""Frozen experts in 8 and 4 bits: what the codes say, and training on them under ZeRO-3."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import read_json
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.adapters.export import export
from mixfuse.train.model.load import check_loaded, load_base, lora_config
from mixfuse.train.model.quantised import NF4, pack, shapes, unpack
from mixfuse.train.model.quantised_experts import scales_of
from mixfuse.train.planning import training_plan
from mixfuse.train.quantization import WEIGHTS_AT_ONCE, Quantization
from mixfuse.train.recipe import Lora, SftRecipe
from mixfuse.train.stages.checks import check_recipe

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
# Of normal weights, the root of the mean square error, relative to theirs. The largest of 64 is about 2.4 standard
# deviations: int8's step is 2.4 / 127 of one, its error 1/√12 of that. NF4's is known: 9 %.
ERROR = {"int8": (0.003, 0.008), "nf4": (0.07, 0.11)}
# Bits of a weight: its code, and in float32 and bfloat16 its share of a scale.
BITS = {
    ("int8", torch.float32): 8.5,
    ("nf4", torch.float32): 4.5,
    ("int8", torch.bfloat16): 8.25,
    ("nf4", torch.bfloat16): 4.25,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_with_the_error_of_their_format(kind: Quantization, dtype: torch.dtype) -> None:
    weight = normal(3, 40, 192).to(dtype)
    codes, scales = pack(weight, kind, dtype)
    assert (codes.shape, scales.shape) == shapes(weight.shape, kind, dtype)
    assert 8 * (codes.nbytes + scales.nbytes) / weight.numel() == BITS[kind, dtype]
    back = unpack(codes, scales)
    assert back.dtype == dtype
    error = float((back.float() - weight.float()).norm() / weight.float().norm())
    low, high = ERROR[kind]
    assert low < error < high
    # An expert is unpacked on its own as it is among the others.
    assert torch.equal(unpack(codes[1], scales[1]), back[1])


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_has_the_nearest_value_of_its_block(kind: Quantization) -> None:
    values = torch.tensor(NF4) if kind == "nf4" else torch.arange(-127, 128) / 127
    weight = normal(5, 128, seed=1)
    back = unpack(*pack(weight, kind, torch.float32))
    for block, found in zip(weight.reshape(-1, 64), back.reshape(-1, 64), strict=True):
        levels = values * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(1).values
        assert torch.allclose((block - found).abs(), nearest, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_the_largest_stays(kind: Quantization) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 7] = -3.0
    back = unpack(*pack(weight, kind, torch.float32))
    assert torch.allclose(back, weight, atol=1e-6)


def test_many_rows_are_unpacked_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = pack(normal(7, 64), "nf4", torch.float32)
    whole = unpack(codes, scales)
    assert whole.numel() < WEIGHTS_AT_ONCE
    monkeypatch.setattr("mixfuse.train.model.quantised.WEIGHTS_AT_ONCE", 128)
    assert torch.equal(unpack(codes, scales), whole)


def dense(model: Any) -> dict[str, Tensor]:
    """The experts' weights, unpacked."""
    found = {}
    for name, module in model.named_modules():
        for key in ("gate_up_proj", "down_proj"):
            if (scales := scales_of(module, key)) is not None:
                found[f"{name}.{key}"] = unpack(getattr(module, key).data, scales.data)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_unpacked_weights(tiny_base: Path, kind: Quantization) -> None:
    """Beside a model that holds the unpacked weights as such, with LoRA on attention and experts."""
    packed, plain = load_base(tiny_base, torch.float32, quantization=kind), load_base(tiny_base, torch.float32)
    weights = dense(packed)
    assert len(weights) == 4
    before = plain(input_ids=torch.tensor([harness.PROBE])).logits
    plain.load_state_dict(weights, strict=False)
    results = []
    for model in (packed, plain):
        torch.manual_seed(0)
        wrapped: Any = get_peft_model(model, lora_config(family_of(tiny_base), Lora(r=4, alpha=8)))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        logits = wrapped(input_ids=torch.tensor([harness.PROBE])).logits
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
        results.append((logits.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert gradient.any(), name
        assert torch.allclose(our_gradients[name], gradient, rtol=1e-4, atol=1e-7), name


def test_a_wrong_code_is_found_after_loading(tiny_base: Path) -> None:
    model = load_base(tiny_base, torch.float32, quantization="nf4")
    model.model.layers[1].mlp.experts.down_proj.data.view(torch.uint8)[2, 0, 0] ^= 16
    with pytest.raises(MixfuseError, match=r"1 weights differ .*layers.1.mlp.experts.down_proj"):
        check_loaded(model, tiny_base, quantization="nf4")


def test_merging_into_codes_is_refused(tiny_base: Path) -> None:
    wrapped: Any = get_peft_model(
        load_base(tiny_base, torch.float32, quantization="int8"), lora_config(family_of(tiny_base), Lora(r=4))
    )
    with pytest.raises(MixfuseError, match="merged into quantised experts"):
        wrapped.merge_adapter()


def test_what_would_change_codes_or_cannot_be_packed_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    def refused(zero: dict[str, Any], *overrides: str) -> str:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
        recipe = load(harness.sft_recipe(tmp_path, tiny_base), SftRecipe, [f"deepspeed={path}", *overrides])
        with pytest.raises(MixfuseError) as raised:
            check_recipe(recipe)
        return str(raised.value)

    packed = "quantization=nf4"
    assert "zero_quantized_weights" in refused({"zero_quantized_weights": True}, packed)
    assert "stage3_use_all_reduce" in refused({"stage3_use_all_reduce_for_fetch_params": True}, packed)
    assert "set quantization" in refused({"zero_quantized_nontrainable_weights": True})
    narrow = shutil.copytree(tiny_base, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    assert "64 and 96 wide" in refused({}, packed, f"base={narrow}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_holds_what_the_packed_model_holds(tiny_base: Path, kind: Quantization) -> None:
    """Byte for byte; and DeepSpeed is told to gather as much less ahead."""
    recipe = load(
        harness.sft_recipe(tiny_base.parent, tiny_base), SftRecipe, [f"quantization={kind}", "dtype=bfloat16"]
    )
    config, zero3 = read_json(tiny_base / "config.json"), read_json(harness.ZERO3)
    hardware = training_plan.Hardware(nodes=1, gpus=2, gpu_bytes=80 << 30)
    planned = training_plan.plan(recipe, config, zero3, hardware)
    shape = planned.shape
    model = load_base(tiny_base, torch.bfloat16, quantization=kind)
    assert planned.base_bytes == sum(parameter.nbytes for parameter in model.parameters())
    plain = training_plan.plan(recipe.model_copy(update={"quantization": None}), config, zero3, hardware)
    saved = plain.base_bytes - planned.base_bytes
    assert saved == 3 * shape.L * shape.E * shape.H * shape.I * (16 - {"int8": 8.25, "nf4": 4.25}[kind]) / 8
    assert plain.held["parameters"] - planned.held["parameters"] == saved / 2
    assert plain.gathered_numel - planned.gathered_numel >= saved / 2
    key = "stage3_prefetch_bucket_size"
    assert planned.zero3["zero_optimization"][key] < plain.zero3["zero_optimization"][key]


def test_the_plan_of_8x22b_counts_what_is_unpacked_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.PROJECT)
    folder = harness.PROJECT / "configs" / "mixtral-8x22b"
    recipe = load(folder / "domain_sft_quantised.yaml", SftRecipe)
    config, zero3 = read_json(folder / "model" / "config.json"), read_json(recipe.deepspeed)
    hardware = training_plan.Hardware(nodes=1, gpus=8, gpu_bytes=80 << 30)
    packed, plain = (
        training_plan.plan(recipe.model_copy(update={"quantization": kind}), config, zero3, hardware)
        for kind in ("nf4", None)
    )
    assert packed.peak.name == plain.peak.name == "layers.55.mlp: backward"
    # A projection of 8 experts, 2 · 16384 · 6144 weights each, in bfloat16; 2²⁴ of them are looked up at once.
    assert packed.peak.workspace - plain.peak.workspace == 2 * 8 * 2 * 16384 * 6144 + (2 + 2) * (1 << 24)
    times = [
        training_plan.speed(packed, tflops=989, utilisation=0.3, bandwidth=1e15, memory_bandwidth=b)
        for b in (1e12, 2e12)
    ]
    # In three passes each of 135 billion weights reads and writes 10.5 bytes.
    seconds = [8 * packed.batch.T / time.compute for time in times]
    assert seconds[0] - seconds[1] == pytest.approx(3 * 10.5 * 56 * 8 * 3 * 16384 * 6144 * (1e-12 - 0.5e-12), rel=1e-6)


@pytest.mark.zero3
@pytest.mark.parametrize(("stage", "kind"), [("sft", "nf4"), ("judge", "int8")])
@pytest.mark.slow
def test_two_processes_train_as_on_a_base_with_the_unpacked_weights(
    stage: str, kind: Quantization, request: pytest.FixtureRequest, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    recipe: Path = request.getfixturevalue(f"{stage}_recipe")
    unquantised: harness.Run = request.getfixturevalue(f"{stage}_by_two")
    base = shutil.copytree(tiny_base, tmp_path / "unpacked")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = unpack(*pack(tensors[name], kind, torch.float32))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    packed = harness.train(stage, recipe, f"out={tmp_path / 'packed'}", "processes=2", f"quantization={kind}")
    plain = harness.train(stage, recipe, f"out={tmp_path / 'plain'}", f"base={base}")
    assert packed.record["metrics"]["processes"] == 2
    for key in ("loss", "grad_norm"):
        ours, theirs, without = packed.series(key), plain.series(key), unquantised.series(key)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert max(abs(a - b) / b for a, b in zip(ours, without, strict=True)) > 3e-3, "the base is as it was"
    for name, weight in plain.weights().items():
        assert (packed.weights()[name] - weight).abs().max() <= 1e-2 * weight.abs().max() + 1e-5, name
    if stage == "sft":
        manifest = export(packed.out, tmp_path / "exported", base=tiny_base)
        assert (manifest.recipe["dtype"], manifest.recipe["quantization"]) == ("float32", kind)
        said = f"trained on the base in float32 with its frozen experts in {kind}"
        assert said in (tmp_path / "exported" / "README.md").read_text()
