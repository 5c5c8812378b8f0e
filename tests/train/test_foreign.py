"""Adapters as other tools write them: what is wrong is named, what can be mended does the same after the export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file, save_file
from train_harness import Run

from mixfuse.cli.entry import main
from mixfuse.contracts import peft_config
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters import layouts, pairing
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.inspect_adapter import inspect

EXPERTS = 4
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused adapter of PEFT's own, with B as training leaves it: an expert's columns are alike."""
    folder = harness.save_adapter(
        tiny_base, tmp_path_factory.mktemp("foreign") / "plain", attention=True, experts=True, r=8
    )
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "experts" in name and "lora_B" in name:
            out, rank = tensor.shape[0], tensor.shape[1] // EXPERTS
            shared = torch.randn(EXPERTS, out, 2, generator=generator) @ torch.randn(
                EXPERTS, 2, rank, generator=generator
            )
            tensors[name] = (0.03 * shared).permute(1, 2, 0).reshape(out, -1).contiguous()
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def reference(plain: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The exported factors of the plain adapter."""
    out = tmp_path_factory.mktemp("reference") / "out"
    export(plain, out, base=tiny_base)
    return load_file(out / WEIGHTS)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "copy")


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def configure(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def blocks(tensors: Tensors) -> Tensors:
    return {
        name: pairing.as_blocks(tensor, EXPERTS) if "experts" in name and "lora_B" in name else tensor
        for name, tensor in tensors.items()
    }


def sharded(folder: Path, *, index: bool = True) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where = {name: f"adapter_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    if index:
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


SHARDS = tuple(f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2))


def resharded(spoil: Callable[[dict[str, Tensors], dict[str, str]], Any]) -> Callable[[Path], None]:
    """Shards with an index, changed by `spoil(the tensors of each shard, the index)`."""

    def write(folder: Path) -> None:
        sharded(folder)
        index = folder / f"{WEIGHTS}.index.json"
        where = json.loads(index.read_text())["weight_map"]
        parts = {name: load_file(folder / name) for name in SHARDS}
        spoil(parts, where)
        for name, tensors in parts.items():
            save_file(tensors, folder / name)
        index.write_text(json.dumps({"weight_map": where}))

    return write


def stacked(tensors: Tensors) -> Tensors:
    """Experts as 3-D factors named after their parameters."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            result[name] = tensor
            continue
        side = name.split(".lora_")[1][0]
        stem = name.split(".experts")[0] + ".experts"
        parameter = "gate_up_proj" if "base_layer" in name else "down_proj"
        cube = (
            tensor.reshape(EXPERTS, -1, tensor.shape[1])
            if side == "A"
            else tensor.reshape(tensor.shape[0], -1, EXPERTS).permute(2, 0, 1)
        )
        result[f"{stem}.{parameter}.lora_{side}.weight"] = cube.contiguous()
    return result


def other_expert_names(tensors: Tensors) -> Tensors:
    """Per expert, under the names of Qwen and of exports from Megatron."""
    roles = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    result: Tensors = {}
    for name, tensor in tensors.items():
        key = name
        for old, new in roles.items():
            key = key.replace(f".{old}.lora", f".{new}.lora")
        result[key.replace("block_sparse_moe", "mlp")] = tensor
    return result


def embedded(folder: Path, base: Path, *, changed: bool) -> None:
    (file,) = base.glob("*.safetensors")
    embedding = load_file(file)["model.embed_tokens.weight"] + (0.1 if changed else 0.0)
    edit(folder, lambda tensors: tensors | {"base_model.model.model.embed_tokens.weight": embedding})


PREFIX = "base_model.model.model."
MENDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "PEFT's fused experts": (lambda folder: None, "its experts are fused"),
    "_orig_mod.": (
        renamed(lambda name: name.replace(PREFIX, "base_model.model._orig_mod.model.")),
        "its names hold _orig_mod.",
    ),
    "module.": (renamed(lambda name: f"module.{name}"), "its names hold module."),
    ".default.": (renamed(lambda name: name.replace(".weight", ".default.weight")), "its names hold .default."),
    "all of these": (
        renamed(lambda name: "module._orig_mod." + name.replace(".weight", ".default.weight")),
        "_orig_mod.",
    ),
    "no prefix": (renamed(lambda name: name.removeprefix("base_model.model.")), "for base_model.model.model."),
    "shards with an index": (sharded, "in 2 shards"),
    "shards without an index": (lambda folder: sharded(folder, index=False), "in 2 shards"),
    "stacked experts": (lambda folder: edit(folder, stacked), "stacked or named after their parameters"),
    "unsloth's blocks": (lambda folder: edit(folder, blocks), "the columns of B are in blocks"),
    "unsloth's blocks, marked": (
        lambda folder: (edit(folder, blocks), configure(folder, lora_B_layout="grouped_by_expert")),
        "its lora_B_layout says so",
    ),
    "EVA": (lambda folder: configure(folder, init_lora_weights="eva"), "its start is 'eva'"),
    "EVA in capitals": (lambda folder: configure(folder, init_lora_weights="EVA"), "its start is 'EVA'"),
    "a start's config": (
        lambda folder: configure(folder, corda_config={"corda_method": "kpm"}, loftq_config={"loftq_bits": 4}),
        "its corda_config, loftq_config set the start of a training",
    ),
    "an unknown key": (
        lambda folder: configure(folder, use_zeta={"a": 1}, beta=2, off=False),
        "keys that neither PEFT 0.21 nor vLLM knows: beta, use_zeta; nobody applies them",
    ),
    "a name without factors": (
        lambda folder: configure(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]),
        "its target_modules names 'gate_proj', of which it holds no factors",
    ),
    "all linear": (
        lambda folder: configure(folder, target_modules="all-linear"),
        "its target_modules are the text 'all-linear'",
    ),
    "a pattern that fits": (
        lambda folder: configure(folder, target_modules=r".*self_attn\.[qkvo]_proj"),
        "its target_modules are the text",
    ),
    "a pattern that leaves out": (
        lambda folder: configure(folder, target_modules=r".*\.q_proj"),
        "its target_modules leave out model.layers.0.self_attn.k_proj, whose factors it holds",
    ),
    "a name as a pattern": (
        lambda folder: configure(folder, target_modules="q_proj"),
        "its target_modules leave out model.layers.0.self_attn.k_proj",
    ),
    "a pattern that is none": (
        lambda folder: configure(folder, target_modules="("),
        "its target_modules cannot be read, or compared with its factors in linear time",
    ),
    "no modules": (
        lambda folder: configure(folder, target_modules=None),
        "its target_modules leave out model.layers.0.self_attn.k_proj",
    ),
    "no parameters": (
        lambda folder: configure(folder, target_parameters=[]),
        "its target_parameters leave out model.layers.0.mlp.experts.down_proj",
    ),
    "parameters of one layer": (
        lambda folder: configure(
            folder, target_parameters=[f"layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
        ),
        "its target_parameters leave out model.layers.1.mlp.experts.down_proj",
    ),
    "excluded modules": (
        lambda folder: configure(folder, exclude_modules=["v_proj"]),
        "its target_modules and exclude_modules leave out model.layers.0.self_attn.v_proj",
    ),
    "layers to transform": (
        lambda folder: configure(folder, layers_to_transform=0),
        "its target_modules and layers_to_transform leave out model.layers.1.self_attn.k_proj",
    ),
    "layers beside a pattern": (
        lambda folder: configure(folder, layers_to_transform=[0, 1], target_modules=r".*self_attn\.[qkvo]_proj"),
        "it has layers_to_transform beside a pattern of target_modules",
    ),
    "a pattern of layers": (
        lambda folder: configure(folder, layers_to_transform=[0, 1], layers_pattern="(a+)+b"),
        "its layers_pattern cannot be read",
    ),
    "Megatron's config": (
        lambda folder: configure(folder, megatron_config={"tensor_model_parallel_size": 2}),
        "it has a megatron_config",
    ),
    "fan_in_fan_out": (lambda folder: configure(folder, fan_in_fan_out=True), "its fan_in_fan_out is true"),
    "dropout of experts": (
        lambda folder: configure(folder, lora_dropout=0.05),
        "its lora_dropout is 0.05, which PEFT refuses for experts",
    ),
    "dropout that is text": (lambda folder: configure(folder, lora_dropout="x"), "its lora_dropout is 'x'"),
    "a base that no folder can be": (
        lambda folder: configure(folder, base_model_name_or_path="x" * 5000),
        "its experts are fused",
    ),
}
APPLIED_BY_PEFT = {
    "PEFT's fused experts", "EVA", "EVA in capitals", "a start's config", "an unknown key", "a name without factors",
    "all linear", "a pattern that fits", "a base that no folder can be",
}  # fmt: skip


@pytest.mark.parametrize("case", MENDED)
def test_what_is_mended_is_the_same_adapter_after_the_export(
    case: str, copy: Path, tiny_base: Path, reference: Tensors, tmp_path: Path
) -> None:
    spoil, message = MENDED[case]
    spoil(copy)
    seen = inspect(copy, base=tiny_base)
    assert message in str(seen)
    assert (seen.vllm, seen.mixfuse) == (False, "after export")
    assert seen.peft == (case in APPLIED_BY_PEFT)
    export(copy, tmp_path / "out", base=tiny_base)
    exported = load_file(tmp_path / "out" / WEIGHTS)
    assert exported.keys() == reference.keys()
    assert all(torch.equal(exported[name], reference[name]) for name in reference)
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["init_lora_weights"] is True
    assert written.keys() <= peft_config.KNOWN_KEYS
    assert not any(written.get(key) for key in ("layers_to_transform", "exclude_modules", "megatron_config"))
    fused = json.loads((tmp_path / "out" / "peft" / CONFIG).read_text())
    assert not fused["lora_dropout"]
    assert not fused.get("fan_in_fan_out")
    modules = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in exported}
    assert all(map(peft_config.Targets(fused).module, (name for name in modules if ".experts." not in name)))
    done = inspect(tmp_path / "out", base=tiny_base)
    assert (done.vllm, done.peft, done.mixfuse, done.findings) == (True, True, "as it is", [])


def test_experts_under_other_names_are_written_under_the_familys(
    plain: Path, tiny_base: Path, reference: Tensors, tmp_path: Path
) -> None:
    export(plain, tmp_path / "own", base=tiny_base)
    for name in (MANIFEST, "README.md"):
        (tmp_path / "own" / name).unlink()
    shutil.rmtree(tmp_path / "own" / "peft")
    edit(tmp_path / "own", other_expert_names)
    assert "its experts have other names than Mixtral's" in str(inspect(tmp_path / "own", base=tiny_base))
    export(tmp_path / "own", tmp_path / "out", base=tiny_base)
    exported = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(exported[name], reference[name]) for name in reference)


def test_eight_bit_factors_are_written_in_bfloat16(copy: Path, tiny_base: Path, tmp_path: Path) -> None:
    edit(copy, lambda tensors: {name: (10 * t).to(torch.float8_e4m3fn) for name, t in tensors.items()})
    before = load_file(copy / WEIGHTS)
    configure(copy, lora_alpha=0.16)
    assert "eight-bit floats (fp8)" in str(inspect(copy, base=tiny_base))
    export(copy, tmp_path / "out", base=tiny_base)
    name = f"{PREFIX}layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[name], before[name].to(torch.bfloat16))


def added(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors | {PREFIX + name: torch.ones(shape)})


def zeros(side: str) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder,
        lambda tensors: {n: torch.zeros_like(t) if f"lora_{side}" in n else t for n, t in tensors.items()},
    )


def megatron(name: str) -> str:
    return (
        name.replace(f"{PREFIX}layers", "decoder.layers").replace("q_proj", "linear_qkv").replace("lora_A", "linear_in")
    )


def stacks(**experts: int) -> Tensors:
    start = "base_model.model.model.layers.0.mlp.experts"
    return {
        f"{start}.{name}.lora_{side}.weight": torch.ones(count, *shape)
        for name, count in experts.items()
        for side, shape in (("A", (8, 64)), ("B", (128, 8)))
    }


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "alpha 0": (lambda folder: configure(folder, lora_alpha=0), "lora_alpha is 0, so the adapter does nothing"),
    "alpha infinite": (lambda folder: configure(folder, lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha absurd": (lambda folder: configure(folder, lora_alpha=10**9), "a scale above 1024"),
    "PiSSA": (lambda folder: configure(folder, init_lora_weights="pissa_niter_16"), "starts from PiSSA"),
    "OLoRA": (lambda folder: configure(folder, init_lora_weights="olora"), "starts from OLoRA"),
    "CorDA": (lambda folder: configure(folder, init_lora_weights="corda"), "starts from CorDA"),
    "aLoRA": (lambda folder: configure(folder, alora_invocation_tokens=[1]), "activated LoRA"),
    "DoRA": (lambda folder: configure(folder, use_dora=True), "DoRA (use_dora)"),
    "DoRA's magnitudes": (added("layers.0.self_attn.q_proj.lora_magnitude_vector", 64), "DoRA's magnitudes"),
    "a bias of B": (added("layers.0.self_attn.q_proj.lora_B.bias", 64), "it holds biases"),
    "trained tokens": (added("embed_tokens.trainable_tokens_delta", 2, 64), "it holds trained tokens"),
    "LoRA on embeddings": (added("embed_tokens.lora_embedding_A", 8, 64), "LoRA on embeddings"),
    "a factor of a factor": (added("layers.0.mlp.gate.lora_.lora_A.weight", 8, 64), "a tensor that is no LoRA factor"),
    "a saved module": (added("layers.0.mlp.gate.modules_to_save.weight", 4, 64), "a module that was trained whole"),
    "a router": (added("layers.0.mlp.gate.weight", 4, 64), "a tensor that is no LoRA factor"),
    "a resized embedding": (added("embed_tokens.weight", 9, 64), "an embedding or output layer"),
    "an output layer": (added("lm_head.base_layer.weight", 9, 64), "an embedding or output layer"),
    "modules_to_save": (lambda folder: configure(folder, modules_to_save=["lm_head"]), "modules_to_save: ['lm_head']"),
    "B all zero": (zeros("B"), "does nothing"),
    "A all zero": (zeros("A"), "does nothing"),
    "drowned": (
        lambda f: edit(f, lambda tensors: {name: t * 1e12 for name, t in tensors.items()}),
        "times its own norm",
    ),
    "Megatron's names": (renamed(megatron), "its names are Megatron's own"),
    "two adapters": (
        lambda f: edit(
            f,
            lambda tensors: {
                n.replace(".weight", f".{'one' if 'q_proj' in n else 'two'}.weight"): t for n, t in tensors.items()
            },
        ),
        "it holds 2 adapters",
    ),
    "whole numbers": (
        lambda f: edit(f, lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()}),
        "is quantised",
    ),
    "another base": (
        lambda f: edit(
            f, lambda tensors: {n: t[:, :32].contiguous() if "q_proj.lora_A" in n else t for n, t in tensors.items()}
        ),
        "belongs to another base model",
    ),
    "no order of columns, by unsloth": (
        lambda f: (
            edit(
                f, lambda tensors: {n: torch.randn(t.shape) * 0.03 if "lora_B" in n else t for n, t in tensors.items()}
            ),
            configure(f, auto_mapping={"unsloth_fixed": True}),
        ),
        "name the order with --expert-columns",
    ),
    "a pattern that PEFT cannot read": (
        lambda f: configure(f, rank_pattern={"(?i)q_proj": 8}),
        "rank_pattern '(?i)q_proj' is no pattern",
    ),
    "a pattern that takes for ever": (
        lambda f: configure(f, alpha_pattern={r"(?=(\w+\.?)+!)q_proj": 8}),
        "cannot be matched in linear time",
    ),
    "too many patterns": (
        lambda f: configure(f, rank_pattern={f"layers.{layer}": 8 for layer in range(20_001)}),
        "names more than 20000 modules",
    ),
    "a layer's number that is none": (
        renamed(lambda n: n.replace("layers.1.", "layers.01.")),
        "'01', which is no number",
    ),
    "a number of thousands of digits": (
        renamed(lambda n: n.replace("layers.1.", f"layers.{'9' * 5000}.")),
        "which is no number of a layer",
    ),
    "another model's names": (
        renamed(lambda n: n.replace("model.model.layers", "model.language_model.model.layers")),
        "is not a part of Mixtral",
    ),
    "stacks of two sizes": (
        lambda f: edit(f, lambda _: stacks(gate_proj=4, up_proj=3, down_proj=4)),
        "its stacked factors are of 3 and of 4 experts",
    ),
    "experts that were not saved": (
        lambda f: edit(f, lambda tensors: {n: t for n, t in tensors.items() if "experts" not in n}),
        "names 'mlp.experts.down_proj', of which it holds no factors; its experts were not saved",
    ),
    "half of the experts' parameters": (
        lambda f: edit(f, lambda tensors: {n: t for n, t in tensors.items() if "experts.base_layer" not in n}),
        "names 'mlp.experts.gate_up_proj', of which it holds no factors",
    ),
    "a rank in the pattern that the factors have not": (
        lambda f: configure(f, rank_pattern={"q_proj": 4}),
        "which does not fit rank 4 (r, rank_pattern)",
    ),
    "factors that cancel layer by layer": (
        lambda f: edit(f, lambda tensors: {n: t * (("layers.0" in n) != ("lora_A" in n)) for n, t in tensors.items()}),
        "so the adapter does nothing",
    ),
    "factors too small": (
        lambda f: edit(f, lambda tensors: {n: t * 1e-15 for n, t in tensors.items()}),
        "too small for float32, so the adapter does nothing",
    ),
    "another task": (lambda f: configure(f, task_type="SEQ_CLS"), "its task_type is 'SEQ_CLS'"),
    "a flag that is text": (lambda f: configure(f, use_rslora="false"), "its use_rslora is 'false'"),
    "a rank that vLLM refuses": (lambda f: configure(f, r=1024), "rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mended_is_refused_by_name(case: str, copy: Path, tiny_base: Path, tmp_path: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(copy)
    seen = inspect(copy, base=tiny_base)
    assert message in str(seen)
    assert seen.mixfuse == "no"
    with pytest.raises(MixfuseError) as caught:
        export(copy, tmp_path / "out", base=tiny_base)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [False, True])
def test_embeddings_saved_along_are_left_out_where_they_are_the_bases(
    changed: bool, copy: Path, tiny_base: Path, tmp_path: Path
) -> None:
    embedded(copy, tiny_base, changed=changed)
    assert "--base tells" in str(inspect(copy))
    if changed:
        with pytest.raises(MixfuseError, match=r"trained or resized: .*embed_tokens"):
            export(copy, tmp_path / "out", base=tiny_base)
        return
    assert "the base's own\n           export: left out" in str(inspect(copy, base=tiny_base))
    export(copy, tmp_path / "out", base=tiny_base)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "adapter_model.bin is one"),
    "a shard is missing": (
        lambda f: (sharded(f), (f / "adapter_model-00002-of-00002.safetensors").unlink()),
        "adapter_model-00002-of-00002.safetensors is missing",
    ),
    "a tensor that is not in its shard": (
        resharded(lambda parts, where: parts[SHARDS[0]].popitem()),
        "is missing, which adapter_model.safetensors.index.json says lies in adapter_model-00001-of-00002",
    ),
    "a tensor that the index does not name": (
        resharded(lambda parts, where: where.popitem()),
        "and adapter_model.safetensors.index.json does not name it",
    ),
    "a tensor in another shard": (
        resharded(lambda parts, where: parts[SHARDS[0]].update([parts[SHARDS[1]].popitem()])),
        "and adapter_model.safetensors.index.json says adapter_model-00002-of-00002.safetensors",
    ),
    "a tensor in both shards": (
        resharded(lambda parts, where: parts[SHARDS[1]].update([list(parts[SHARDS[0]].items())[-1]])),
        "lies in two files",
    ),
    "a shard that the index does not name": (
        resharded(lambda parts, where: parts.update({"adapter_model-00003-of-00003.safetensors": parts[SHARDS[0]]})),
        "does not name adapter_model-00003-of-00003.safetensors",
    ),
    "a file beside its shards": (
        lambda f: (shutil.copy(f / WEIGHTS, f / "kept"), sharded(f), (f / "kept").rename(f / WEIGHTS)),
        "and nothing says which are meant",
    ),
    "shards of two saves": (
        lambda f: (
            sharded(f, index=False),
            (f / SHARDS[0]).rename(f / "adapter_model-00001-of-00003.safetensors"),
        ),
        "only 2 shards of a save are here, or of several",
    ),
    "shards without numbers": (
        lambda f: (sharded(f, index=False), (f / SHARDS[0]).rename(f / "adapter_model-a-of-b.safetensors")),
        "only 2 shards of a save are here, or of several",
    ),
    "an index that leads out": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            (f / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../../x"}})),
        ),
        "lies outside the folder",
    ),
    "a name that is too long": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            (f / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}})),
        ),
        "is missing, which",
    ),
    "a link to itself": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(WEIGHTS)),
        "is a link that leads back to itself",
    ),
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[]"), "holds no JSON object, but a list"),
    "half a surrogate pair": (
        lambda f: configure(f, revision="\ud800"),
        "half a surrogate pair",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "no such file"),
    "weights linked to elsewhere": (
        lambda f: (
            (f / WEIGHTS).rename(f.parent / "elsewhere.safetensors"),
            (f / WEIGHTS).symlink_to(f.parent / "elsewhere.safetensors"),
        ),
        "is a link out of the folder",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "0.self_attn.q_proj.lora_A" not in n}, "the file is incomplete"),
        (lambda t: {n: v.T.contiguous() if "q_proj.lora_A" in n else v for n, v in t.items()}, "not of rank 8"),
        (lambda t: {n: v[:4] if "lora_A" in n else v[:, :4].contiguous() for n, v in t.items()}, "not of rank 8"),
        (lambda t: {n: v * 1e12 for n, v in t.items()}, "more than any training does"),
    ],
)
def test_damaged_factors_are_seen_without_a_base(spoil: Callable[[Tensors], Tensors], message: str, copy: Path) -> None:
    edit(copy, lambda tensors: spoil({n: t for n, t in tensors.items() if "experts" not in n}))
    configure(copy, target_parameters=None)
    seen = inspect(copy)
    assert message in str(seen)
    assert seen.mixfuse == "no"


def test_targets_that_leave_out_factors_are_written_from_them(
    copy: Path, tiny_base: Path, reference: Tensors, tmp_path: Path
) -> None:
    configure(copy, target_modules=["k_proj"])
    seen = inspect(copy, base=tiny_base)
    assert "its target_modules leave out" in str(seen)
    assert not seen.peft
    export(copy, tmp_path / "out", base=tiny_base)
    assert {"q_proj", "v_proj"} <= set(json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"])
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(written[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (REFUSED["factors that cancel layer by layer"][0], "so the adapter does nothing"),
        (REFUSED["factors too small"][0], "too small for float32, so the adapter does nothing"),
        (REFUSED["a rank in the pattern that the factors have not"][0], "not of rank 4"),
        (lambda f: configure(f, rank_pattern={"gate_up_proj": 3}), "not of rank 3"),
        (lambda f: configure(f, alpha_pattern={r".*": 1e-30}), "so the adapter does nothing"),
    ],
)
def test_an_adapter_with_experts_that_does_nothing_is_seen_without_a_base(
    spoil: Callable[[Path], Any], message: str, copy: Path
) -> None:
    spoil(copy)
    seen = inspect(copy)
    assert message in str(seen)
    assert seen.mixfuse == "no"


def test_experts_that_do_nothing_are_said(copy: Path, tiny_base: Path) -> None:
    edit(copy, lambda tensors: {n: t * ("experts" not in n or "lora_A" in n) for n, t in tensors.items()})
    for base in (None, tiny_base):
        assert "every lora_B of its experts is zero, so its experts do nothing" in str(inspect(copy, base=base))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_matched_in_linear_time_and_as_peft_does(key: str, copy: Path, tiny_base: Path) -> None:
    configure(copy, **{key: {r"(([a-z_.0-9])+)+!": 3, r"(\w+\.?)+X": 5, "q_proj|.*v_proj": 8, "layers.0.mlp": 9}})
    assert inspect(copy, base=tiny_base).mixfuse == "after export"


def test_each_module_has_the_value_that_peft_finds() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {
        "layers.1.self_attn.q_proj": 2,
        "q_pro.": 3,
        "^model.layers.0.self_attn.v_proj": 4,
        "v_proj": 5,
        "k|o": 6,
    }
    values = layouts.ByModule({"r": 8, "rank_pattern": patterns}, "rank_pattern", "r", Path())
    for module in (f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkvo"):
        expected = patterns.get(get_pattern_key(list(patterns), module), 8)
        assert values.of(f"base_model.model.{module}.lora_A.weight") == expected


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_read_is_one_line(case: str, copy: Path, tiny_base: Path, tmp_path: Path) -> None:
    spoil, message = DAMAGED[case]
    spoil(copy)
    for look in (lambda: inspect(copy), lambda: export(copy, tmp_path / "out", base=tiny_base)):
        with pytest.raises(MixfuseError) as caught:
            look()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("trace", "maker"),
    [
        (lambda f: configure(f, auto_mapping={"unsloth_fixed": True}), "unsloth"),
        (lambda f: configure(f, base_model_name_or_path="unsloth/Mixtral-8x7B"), "unsloth"),
        (lambda f: (f / "README.md").write_text("---\ntags:\n- axolotl\n---\n"), "axolotl"),
        (lambda f: (f / "README.md").write_text("---\ntags:\n- llama-factory\n- lora\n---\n"), "LLaMA-Factory"),
        (lambda f: (f / "additional_config.json").write_text("{}"), "ms-swift"),
        (renamed(megatron), "Megatron"),
        (lambda f: None, "PEFT"),
    ],
)
def test_its_maker_is_named(trace: Callable[[Path], Any], maker: str, copy: Path) -> None:
    (copy / "README.md").unlink(missing_ok=True)
    trace(copy)
    assert inspect(copy).maker.startswith(maker)


def test_the_order_of_columns_is_told_from_a_trained_adapter(sft_by_one: Run) -> None:
    tensors = load_file(sft_by_one.out / "adapter" / WEIGHTS)
    factors = [tensor for name, tensor in tensors.items() if "experts" in name and "lora_B" in name]
    right = pairing.told(factors, EXPERTS)
    wrong = pairing.told([pairing.as_blocks(factor, EXPERTS) for factor in factors], EXPERTS)
    assert right
    assert wrong
    assert (right.order, wrong.order) == ("peft", "blocks")
    assert all(torch.equal(pairing.as_peft(pairing.as_blocks(f, EXPERTS), EXPERTS), f) for f in factors)


def test_the_order_of_columns_can_be_said(copy: Path, tiny_base: Path, reference: Tensors, tmp_path: Path) -> None:
    spoil, _ = REFUSED["no order of columns, by unsloth"]
    spoil(copy)
    export(copy, tmp_path / "peft", base=tiny_base, columns="peft")
    export(copy, tmp_path / "blocks", base=tiny_base, columns="blocks")
    one, other = (load_file(tmp_path / order / WEIGHTS) for order in ("peft", "blocks"))
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_prints_a_screen_and_says_by_its_status_whether_it_can_be_served(
    copy: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "inspect", str(copy), "--base", str(tiny_base)]) == 0
    screen = capsys.readouterr().out
    assert "served after: mixfuse adapter export" in screen
    assert len(screen.splitlines()) < 24
    assert main(["adapter", "inspect", str(copy), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["vllm"], told["peft"], told["mixfuse"]) == (False, True, "after export")
    assert "no effect is proven" in told["base"]
    configure(copy, lora_alpha=0)
    assert main(["adapter", "inspect", str(copy)]) == 1
    assert "wrong    lora_alpha is 0, so the adapter does nothing\n           refused" in capsys.readouterr().out
    assert main(["adapter", "inspect", str(tmp_path / "nowhere")]) == 2


def test_verify_without_a_base_says_that_no_effect_is_proven(
    copy: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(copy, tmp_path / "out", base=tiny_base)
    capsys.readouterr()
    assert main(["adapter", "verify", str(tmp_path / "out")]) == 0
    assert "not proven that an engine applies it" in capsys.readouterr().out
