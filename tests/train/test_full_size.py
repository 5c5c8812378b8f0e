"""All of Mixtral 8x22B's path that needs no GPU: on the meta device, on a checkpoint of holes, and one real adapter.

140.6 B parameters, and less than 5 GB of memory: weights are shapes only, the checkpoint is a set of sparse files whose
headers are true and whose 281 GB of zeros take no room on the disk. The adapter is real: 475.3 M numbers, written,
exported and read again.
"""

import json
import math
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from train_harness import PROJECT
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.families import family_of, shape_of
from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.contracts.family import active_parameters, base_parameters
from mixfuse.train.adapters.export import export
from mixfuse.train.model import expert_lora
from mixfuse.train.model.load import Checkpoint, lora_config, mark_leaves
from mixfuse.train.planning import memory
from mixfuse.train.recipe import Lora, lora_parameters

MODEL = PROJECT / "configs" / "mixtral-8x22b" / "model"
CONFIG = json.loads((MODEL / "config.json").read_text())
LAYERS, HIDDEN, INNER, EXPERTS, VOCABULARY = 56, 6144, 16384, 8, 32768
KEYS = 1024  # 8 heads of 128
LORA = Lora(r=16, alpha=32)


def saved_tensors() -> dict[str, list[int]]:
    """The tensors of the published checkpoint: names and shapes as its index lists them."""
    tensors = {
        "model.embed_tokens.weight": [VOCABULARY, HIDDEN],
        "model.norm.weight": [HIDDEN],
        "lm_head.weight": [VOCABULARY, HIDDEN],
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.input_layernorm.weight"] = [HIDDEN]
        tensors[f"{stem}.post_attention_layernorm.weight"] = [HIDDEN]
        for name, rows in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = [rows, HIDDEN]
        tensors[f"{stem}.block_sparse_moe.gate.weight"] = [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            for name, shape in (("w1", [INNER, HIDDEN]), ("w2", [HIDDEN, INNER]), ("w3", [INNER, HIDDEN])):
                tensors[f"{stem}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return tensors


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder at full size whose weights are a hole."""
    folder = tmp_path_factory.mktemp("full") / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copy(MODEL / "config.json", folder)
    shards: dict[str, dict[str, list[int]]] = {}
    for name, shape in saved_tensors().items():  # a shard a layer, about 5 GB, as published
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        header, end = {}, 0
        for name, shape in tensors.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def on_meta() -> MixtralForCausalLM:
    """8x22B as `load_base` leaves it, without weights."""
    expert_lora.register()
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig.from_dict(CONFIG)).to(torch.bfloat16)
    model.set_experts_implementation(expert_lora.EXPERTS_IMPLEMENTATION)
    mark_leaves(model)
    return model


@pytest.fixture(scope="module")
def adapted() -> Any:
    with torch.device("meta"):
        return get_peft_model(on_meta(), lora_config(MIXTRAL, LORA), autocast_adapter_dtype=False)


def test_the_sizes_are_those_measured(adapted: Any) -> None:
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    assert frozen == 140_630_071_296
    assert trained == 475_267_072
    assert all(parameter.is_meta for parameter in adapted.parameters())
    shape = shape_of(CONFIG)
    assert base_parameters(shape) == frozen
    assert active_parameters(shape) == pytest.approx(39.16e9, rel=1e-3)
    assert sum(sum(layer) for layer in lora_parameters(CONFIG, LORA)) == trained
    assert sum(p.numel for p in memory.all_parameters(memory.modules(shape, LORA))) == frozen + trained


def test_each_moe_block_is_a_leaf_of_the_size_that_is_gathered(adapted: Any) -> None:
    blocks = [layer.mlp for layer in adapted.get_base_model().model.layers]
    assert len(blocks) == LAYERS
    assert all(z3_leaf_module(block) for block in blocks)
    for block in blocks:
        frozen = sum(parameter.numel() for parameter in block.parameters() if not parameter.requires_grad)
        assert frozen == memory.moe_block_parameters(shape_of(CONFIG))
        assert 2 * frozen == pytest.approx(4.83e9, rel=1e-3)  # bytes


def test_lora_runs_in_activation_space_on_every_layer(adapted: Any) -> None:
    expert_lora.assert_in_force(adapted)
    by_layer = Counter(
        name.split(".layers.")[1].split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad
    )
    assert by_layer == {str(layer): 2 * (4 + 2) for layer in range(LAYERS)}


def test_the_first_forward_passes_all_layers(adapted: Any) -> None:
    batch, length = 1, 512
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")
    logits = adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.is_meta
    assert logits.shape == (batch, length, VOCABULARY)


def test_every_parameter_is_found_in_the_checkpoint_under_its_saved_names(base: Path) -> None:
    """The model has transformers 5's names, the file w1, w2, w3: each stored tensor has one place, none is left."""
    parameters = {name: parameter.shape for name, parameter in on_meta().named_parameters()}
    checkpoint = Checkpoint(base, family_of(base))
    checkpoint.check_names(parameters)  # names and shapes, and that none is left over
    left = saved_tensors()
    for name, shape in parameters.items():
        stored = [math.prod(left.pop(key)) for _, key in checkpoint.pieces_of(name, shape)]
        assert sum(stored) == math.prod(shape), name
    assert not left, "tensors of the checkpoint that no parameter is loaded from"


def test_transformers_maps_the_saved_names_to_the_same_parameters(base: Path) -> None:
    mapping = get_checkpoint_conversion_mapping("mixtral")
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_parameter: dict[str, set[str]] = {}
    for saved in saved_tensors():
        name, _ = rename_source_key(saved, renamings, converters)
        by_parameter.setdefault(name, set()).add(saved)
    checkpoint = Checkpoint(base, family_of(base))
    ours = {
        name: {key for _, key in checkpoint.pieces_of(name, parameter.shape)}
        for name, parameter in on_meta().named_parameters()
    }
    assert by_parameter == ours


@pytest.mark.slow
def test_an_adapter_of_full_size_is_exported_and_read_again(adapted: Any, base: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "peft", tmp_path / "adapter"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            # One row of numbers, repeated: half a billion random ones would take longer than all the rest.
            row = torch.randn(parameter.shape[1], generator=generator).to(torch.bfloat16)
            weights[name.replace(".default.", ".")] = row.expand(parameter.shape).contiguous()
    save_file(weights, source / contract.WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA.r,
        "lora_alpha": LORA.alpha,
        "bias": "none",
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (source / contract.CONFIG).write_text(json.dumps(config))
    assert (source / contract.WEIGHTS).stat().st_size == pytest.approx(0.95e9, rel=1e-2)
    del weights

    manifest = export(source, out, base=base)
    shutil.rmtree(source)
    assert contract.verify(out, base=contract.fingerprint(base)) == manifest
    assert manifest.experts_trained
    with safe_open(out / contract.WEIGHTS, "pt") as split, safe_open(out / "peft" / contract.WEIGHTS, "pt") as fused:
        names = set(split.keys())
        assert len(names) == LAYERS * (4 + 3 * EXPERTS) * 2
        for layer in (0, LAYERS - 1):
            stem = f"base_model.model.model.layers.{layer}"
            a_up = fused.get_tensor(f"{stem}.mlp.experts.base_layer.lora_A.weight")  # (E·r, H)
            b_up = fused.get_tensor(f"{stem}.mlp.experts.base_layer.lora_B.weight")  # (2I, r·E)
            for expert in (0, EXPERTS - 1):
                block = f"{stem}.block_sparse_moe.experts.{expert}"
                rows = slice(expert * LORA.r, (expert + 1) * LORA.r)
                for name, half in (("w1", slice(None, INNER)), ("w3", slice(INNER, None))):
                    assert torch.equal(split.get_tensor(f"{block}.{name}.lora_A.weight"), a_up[rows])
                    assert torch.equal(split.get_tensor(f"{block}.{name}.lora_B.weight"), b_up[half, expert::EXPERTS])
                assert split.get_slice(f"{block}.w2.lora_A.weight").get_shape() == [LORA.r, INNER]
                assert split.get_slice(f"{block}.w2.lora_B.weight").get_shape() == [HIDDEN, LORA.r]
                assert split.get_tensor(f"{block}.w2.lora_B.weight").dtype == torch.bfloat16
    shutil.rmtree(out)
