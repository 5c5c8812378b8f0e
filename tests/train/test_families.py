"""Each family in `contracts/families/`: training, export and the planners agree with transformers and PEFT.

Serving is in `tests/serve/test_families_served.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from memory_tracker import Tracker
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named, family_of, known_families, shape_of
from mixfuse.contracts.family import active_parameters, base_parameters
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.merge_into_base import merge
from mixfuse.train.model import expert_lora
from mixfuse.train.model.attention import check_packing
from mixfuse.train.model.embedded_base import build
from mixfuse.train.model.family_classes import classes_of
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.planning import memory, training_plan
from mixfuse.train.planning.memory import Batch
from mixfuse.train.recipe import Lora

FAMILIES = tuple(known_families())
# PEFT converts per-expert factors to fused ones of twice the rank, and warns of the patterns it makes up for that.
loads_in_peft = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random base of each family."""
    folder = tmp_path_factory.mktemp("families")
    for model_type in FAMILIES:
        if model_type != "mixtral":
            build(folder / model_type, tiny=True, family=model_type)
    return {model_type: folder / model_type for model_type in FAMILIES} | {"mixtral": tiny_base}


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers and plain PEFT compute for a fixed text."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.tensor([harness.PROBE])).logits
    return result


def test_an_unknown_family_is_refused_by_name_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=f"model type 'llama' is not supported; supported are {', '.join(FAMILIES)}"):
        family_named("llama")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MixfuseError, match=f"{tmp_path}: model type None is not supported"):
        family_of(tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_names_are_those_of_transformers(model_type: str, bases: dict[str, Path]) -> None:
    """In the model and in the checkpoint that transformers saves."""
    base, family = bases[model_type], family_named(model_type)
    config = json.loads((base / "config.json").read_text())
    shape = shape_of(config)
    model = load_base(base, torch.float32)  # compares every weight with the checkpoint
    assert base_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    for parameter in family.expert_parameters:
        assert {f"model.layers.{layer}.{parameter}" for layer in range(shape.L)} <= names
    with safe_open(base / "model.safetensors", framework="pt") as checkpoint:
        stored = set(checkpoint.keys())
    for projection in family.expert_projections:
        assert f"model.layers.1.{family.checkpoint_block}.experts.{shape.E - 1}.{projection}.weight" in stored


@pytest.mark.parametrize("model_type", FAMILIES)
def test_expert_lora_computes_what_peft_computes(model_type: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Saved as this project saves it, loaded by plain PEFT with transformers' own experts."""
    base = bases[model_type]
    harness.save_adapter(base, tmp_path / "adapter", attention=True, experts=True)
    config = lora_config(family_of(base), Lora(r=4, alpha=16))
    ours = PeftModel.from_pretrained(load_base(base, torch.float32), str(tmp_path / "adapter"), config=config).eval()
    expert_lora.assert_in_force(ours)
    with torch.no_grad():
        actual = ours(input_ids=torch.tensor([harness.PROBE])).logits
    expected = logits(base, tmp_path / "adapter")
    assert (expected - logits(base)).abs().max() > 0.1, "the adapter does too little to tell"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@loads_in_peft
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_exported_adapter_does_the_same_in_plain_peft(
    model_type: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Per expert and fused; the manifest and the card name the family; the merged base computes the same, too."""
    base, family = bases[model_type], family_named(model_type)
    harness.save_adapter(base, tmp_path / "adapter", attention=True, experts=True)
    manifest = export(tmp_path / "adapter", tmp_path / "out", base=base)
    assert manifest.model_type == model_type
    assert manifest.experts_trained
    assert f"- {model_type}\n" in (tmp_path / "out" / "README.md").read_text()
    names = load_file(tmp_path / "out" / contract.WEIGHTS)
    stem = "base_model.model.model.layers.1"
    assert all(family.factor_name(stem, 3, projection, "B") in names for projection in family.expert_projections)
    expected = logits(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base, tmp_path / "out"), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(base, tmp_path / "out" / "peft"), expected, rtol=0, atol=1e-5)
    assert merge(tmp_path / "out", tmp_path / "merged", base=base, check=False).tensors == 2 * (4 + 4 * 3)
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_of_another_family_is_refused(model_type: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Its experts would be passed over: the base has no module of that name."""
    family = family_named(model_type)
    other = next(other for other in known_families().values() if other != family)
    harness.save_adapter(bases[other.model_type], tmp_path / "adapter", attention=False, experts=True)
    export(tmp_path / "adapter", tmp_path / "out", base=bases[other.model_type])
    (tmp_path / "published").mkdir()
    for name in (contract.CONFIG, contract.WEIGHTS):
        (tmp_path / "published" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    with pytest.raises(MixfuseError, match=f"it was made for .*, which is {other.title}; .* is {family.title}"):
        export(tmp_path / "published", tmp_path / "again", base=bases[model_type])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_missing_or_surplus_weight_of_the_checkpoint_is_named(
    model_type: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, family = bases[model_type], family_named(model_type)
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    missing = f"model.layers.0.{family.checkpoint_block}.experts.2.{family.down}.weight"
    save_file({name: w for name, w in weights.items() if name != missing}, tmp_path / "model.safetensors")
    with pytest.raises(MixfuseError, match=r"does not load|missing keys"):
        load_base(tmp_path, torch.float32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packing_is_probed_on_the_familys_own_layer(model_type: str, bases: dict[str, Path]) -> None:
    check_packing("sdpa", classes_of(model_type).config.from_pretrained(bases[model_type]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_layer_keeps_for_backward_is_the_formulas_to_the_byte(
    model_type: str, dtype: torch.dtype, bases: dict[str, Path]
) -> None:
    expert_lora.register()
    classes, lora, batch = classes_of(model_type), Lora(r=8), Batch(2, 48)
    config = json.loads((bases[model_type] / "config.json").read_text()) | {"num_hidden_layers": 1, "vocab_size": 64}
    config = {key: value for key, value in config.items() if not key.endswith("layer_types")}  # one per layer
    shape = shape_of(config)
    model = classes.causal_lm(classes.config.from_dict(config)).to(dtype)
    model.set_experts_implementation(expert_lora.EXPERTS_IMPLEMENTATION)
    peft_config = lora_config(family_named(model_type), lora)
    adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False).to(dtype).train()
    x = torch.randn(batch.B, batch.S, shape.H, dtype=dtype, requires_grad=True) * 1
    turns = [torch.randn(1, batch.S, shape.D, dtype=dtype) for _ in range(2)]
    mask = torch.ones(batch.B, 1, batch.S, batch.S, dtype=torch.bool).tril()
    gate_dtypes: list[torch.dtype] = []
    (router,) = (module for module in adapted.modules() if isinstance(module, classes.router))
    router.register_forward_hook(lambda _router, _inputs, outputs: gate_dtypes.append(outputs[1].dtype))
    tracker = Tracker()
    tracker.see([*adapted.parameters(), x, *turns, mask])
    before = tracker.total
    with tracker:
        y = model.model.layers[0](x, position_embeddings=tuple(turns), attention_mask=mask)
    saved = tracker.total - before - y.nbytes
    planned = memory.layer_saved(shape, batch, dtype.itemsize, lora, cuda=False)
    # The plan assumes gate weights in float32, as in Mixtral. Qwen3-MoE's router rounds them to the model's dtype.
    rounded = (memory.FP32 - gate_dtypes[0].itemsize) * batch.T * shape.K
    assert saved == planned - rounded


@pytest.mark.parametrize(
    ("model", "total", "active"), [("qwen3-30b-a3b", 30.53e9, 3.35e9), ("qwen3-235b-a22b", 235.09e9, 22.19e9)]
)
def test_full_sizes_are_those_of_the_meta_device(model: str, total: float, active: float) -> None:
    """The published figures are 30.5 B with 3.3 B active and 235 B with 22 B active (arXiv 2505.09388)."""
    config = json.loads((harness.PROJECT / "configs" / model / "model" / "config.json").read_text())
    assert training_plan.count_on_meta(config) == base_parameters(shape_of(config))
    assert base_parameters(shape_of(config)) == pytest.approx(total, rel=1e-3)
    assert active_parameters(shape_of(config)) == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("shared_expert_intermediate_size", 128),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
    ],
)
def test_a_variant_of_qwen3_that_is_not_supported_is_refused_by_name(key: str, value: Any) -> None:
    config = json.loads((harness.PROJECT / "configs" / "qwen3-30b-a3b" / "model" / "config.json").read_text())
    with pytest.raises(MixfuseError, match=f"{key} is .* does not support"):
        shape_of({**config, key: value})


def test_both_names_of_qwen3s_number_of_experts_are_read(bases: dict[str, Path]) -> None:
    """The Hub's configs say `num_experts`; transformers 5 saves `num_local_experts`."""
    config = json.loads((bases["qwen3_moe"] / "config.json").read_text())
    assert "num_experts" not in config
    assert shape_of(config).E == config.pop("num_local_experts") == 4
    assert shape_of({**config, "num_experts": 7}).E == 7
