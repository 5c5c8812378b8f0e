"""What an adapter file may be: bounded, regular, of known shapes, and of weights that an engine can bear."""

import dataclasses
import json
import os
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter, peft_config
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest
from mixfuse.contracts.adapter_weights import check_directory, safetensors_header
from mixfuse.contracts.bounded_json import read_object
from mixfuse.contracts.errors import MixfuseError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
BASE_STD = 0.02


def tensors(fill: float = 0.05) -> dict[str, Any]:
    random = numpy.random.default_rng(0)
    return {
        f"{Q}.lora_A.weight": (random.standard_normal((2, 8)) * fill).astype(numpy.float32),
        f"{Q}.lora_B.weight": (random.standard_normal((8, 2)) * fill).astype(numpy.float32),
    }


def write(folder: Path, weights: dict[str, Any], *, experts_trained: bool = False, **config: Any) -> Path:
    """An adapter directory of rank 2, its hashes right."""
    folder.mkdir()
    save_file(weights, folder / WEIGHTS)
    keys = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(keys | config))
    return hashed(folder, experts_trained=experts_trained)


def hashed(folder: Path, *, experts_trained: bool = False) -> Path:
    (folder / MANIFEST).unlink(missing_ok=True)
    files = adapter.file_hashes(folder)
    manifest = Manifest(
        role="domain",
        revision=adapter.revision_of(files),
        base=adapter.Fingerprint(config="0", tokenizer="0", chat_template="0", weights="0"),
        base_path="base",
        rank=2,
        experts_trained=experts_trained,
        files=files,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    weight = numpy.random.default_rng(1).standard_normal((8, 8)) * BASE_STD
    save_file({"model.layers.0.self_attn.q_proj.weight": weight.astype(numpy.float32)}, folder / "model.safetensors")
    return folder


NEST = "[" * 60_000 + "]" * 60_000
FLAT = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
BAD_DOCUMENTS: dict[str, tuple[str, str]] = {
    "a list": ("[1, 2]", "holds no JSON object, but a list"),
    "a text": ('"x"', "holds no JSON object, but a text"),
    "null": ("null", "holds no JSON object, but null"),
    "a number": ("7", "holds no JSON object, but a number"),
    "nested": (f'{{"a": {NEST}}}', "nested"),
    "nested objects": ('{"a":' * 90_000 + "1" + "}" * 90_000, "nested"),
    "many lists": ('{"a": [' + "[]," * 1_000_000 + "1]}", "holds more than 200000 objects and arrays"),
    "huge": ('{"a": "' + "x" * (31 << 20) + '"}', "larger than 4 MiB"),
    "half": ('{"a": ', "not valid JSON"),
    "no text": ("\udcff", "not valid JSON"),
    "a number of ten thousand digits": ('{"r": ' + "9" * 10_000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize("name", [MANIFEST, CONFIG])
@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_a_manifest_or_config_beyond_a_limit_is_one_line_and_little_memory(
    name: str, case: str, tmp_path: Path
) -> None:
    content, message = BAD_DOCUMENTS[case]
    folder = write(tmp_path / "adapter", tensors())
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    if name == CONFIG:
        hashed(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MixfuseError) as caught:
        adapter.verify(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < len(str(folder)) + 300


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


@pytest.mark.parametrize("name", [MANIFEST, CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (_fifo, r"is no regular file"),
        (_folder, r"is no regular file|cannot be read|is missing"),
        (_link, r"is a link|was changed after export"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    name: str, turn: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", tensors())
    turn(folder / name)
    with pytest.raises(MixfuseError, match=message):
        adapter.verify(folder)


def header(text: str, data: bytes = b"\0" * 4) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content + data


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header is too long"),
    "a length beyond the file": (struct.pack("<Q", 1 << 60), "header is too long"),
    "a list": (header("[1]"), "holds no JSON object, but a list"),
    "a tensor that is a list": (header('{"a": [1]}'), "'a' is no tensor"),
    "no shape": (header('{"a": {"dtype": "F32", "data_offsets": [0, 4]}}'), "'a' has no shape"),
    "a shape that is text": (
        header('{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}'),
        "a shape that is",
    ),
    "a negative size": (header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "a shape that is"),
    "a size that is true": (header('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}'), "a shape that"),
    "another shape": (
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'),
        "does not fit its bytes",
    ),
    "no dtype": (header('{"a": {"shape": [1], "data_offsets": [0, 4]}}'), "'a' has no dtype"),
    "no offsets": (header('{"a": {"dtype": "F32", "shape": [1]}}'), "'a' has no data_offsets"),
    "one offset": (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "lies outside the file"),
    "outside": (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'), "lies outside the file"),
    "overlapping": (
        header(f'{{"a": {FLAT}, "b": {FLAT}}}'),
        "overlap or leave gaps",
    ),
    "nested": (header(f'{{"a": {NEST}}}'), "nested"),
    "a tensor twice": (header(f'{{"a": {FLAT}, "a": {FLAT}}}'), "the key 'a' stands twice"),
    "many tensors": (header("{" + ",".join(f'"{i}":{FLAT}' for i in range(200_001)) + "}"), "more than 200000 tensors"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_damaged_header_is_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_HEADERS[case]
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(MixfuseError, match=re.escape(message)) as caught:
        safetensors_header(tmp_path / WEIGHTS)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "VERA"}, "a VERA adapter; only LoRA can be served"),
    "no method": ({"peft_type": None}, "it has no peft_type; only LoRA can be served"),
    "rank 0": ({"r": 0}, "0 for the rank 'r'"),
    "a rank that is text": ({"r": "2"}, "'2' for the rank 'r'"),
    "no alpha": ({"lora_alpha": None}, "has no 'lora_alpha'"),
    "alpha true": ({"lora_alpha": True}, "has True for 'lora_alpha'"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0, so the adapter does nothing"),
    "alpha inf": ({"lora_alpha": float("inf")}, "lora_alpha is inf; it must be a finite number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha below 0": ({"lora_alpha": -4}, "lora_alpha is -4"),
    "absurd alpha": ({"lora_alpha": 1e30}, "lora_alpha is 1e+30 at rank 2, a scale above 1024"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "starts from PiSSA"),
    "PiSSA in few steps": ({"init_lora_weights": "pissa_niter_4"}, "starts from PiSSA"),
    "OLoRA": ({"init_lora_weights": "olora"}, "starts from OLoRA"),
    "CorDA": ({"init_lora_weights": "corda"}, "starts from CorDA"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "starts from LoftQ"),
    "an unknown start": ({"init_lora_weights": "zeta"}, "an unknown start (init_lora_weights: 'zeta')"),
    "DoRA": ({"use_dora": True}, "DoRA (use_dora)"),
    "a bias": ({"bias": "all"}, "bias: 'all'"),
    "a bias beside B": ({"lora_bias": True}, "lora_bias"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "BD-LoRA": ({"use_bdlora": {"a": 1}}, "use_bdlora"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "a pattern of ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern, which no export writes"),
    "a bad pattern": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern 'q_proj' is 0"),
    "a pattern that is a list": ({"alpha_pattern": [1]}, "its alpha_pattern is [1]; it must be an object"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "rank_pattern '(' is no pattern"),
    "targets that are no names": (
        {"target_modules": [1]},
        "its target_modules is [1]; it must be a pattern or",
    ),
    "a parameter that is text": (
        {"target_parameters": "experts"},
        "its target_parameters is 'experts'; it must be a",
    ),
    "a rank above vLLM's": ({"r": 1024}, "its rank is 1024; vLLM serves ranks up to 512"),
    "alpha that is text": ({"lora_alpha": "4"}, "has '4' for 'lora_alpha'; it must be a number above 0"),
    "a rank that is true": ({"r": True}, "True for the rank 'r'"),
    "a rank below 0": ({"r": -2}, "-2 for the rank 'r'"),
    "a rank with a point": ({"r": 2.0}, "2.0 for the rank 'r'"),
    "a flag that is text": ({"use_rslora": "false"}, "its use_rslora is 'false'; it must be true or false"),
    "a flag that is a number": ({"fan_in_fan_out": 1}, "its fan_in_fan_out is 1; it must be true or false"),
    "targets that are a number": ({"target_modules": 5}, "its target_modules is 5"),
    "exclusions that are a number": ({"exclude_modules": 5}, "its exclude_modules is 5"),
    "layers that are text": ({"layers_to_transform": ["0"]}, "its layers_to_transform is ['0']; it must be a layer's"),
    "a layer below 0": ({"layers_to_transform": -1}, "its layers_to_transform is -1"),
    "saved modules that are a number": ({"modules_to_save": 5}, "its modules_to_save is 5"),
    "a start's config that is text": ({"eva_config": "x"}, "its eva_config is 'x'; it must be an object"),
    "a mapping that is a list": ({"auto_mapping": [1]}, "its auto_mapping is [1]"),
    "Megatron's config as text": ({"megatron_config": "x"}, "its megatron_config is 'x'"),
    "a base that is a number": ({"base_model_name_or_path": 5}, "its base_model_name_or_path is 5; it must be a text"),
    "a bias that is true": ({"bias": True}, "its bias is True; it must be a text"),
    "another task": ({"task_type": "SEQ_CLS"}, "its task_type is 'SEQ_CLS'; only adapters that write text"),
    "no targets": ({"target_modules": None}, "no target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_refuses_or_would_not_apply_is_refused_first(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    with pytest.raises(MixfuseError) as caught:
        adapter.verify(write(tmp_path / "adapter", tensors(), **config))
    assert message in str(caught.value)


def test_every_key_that_vllm_refuses_is_refused_here_too() -> None:
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    from vllm.config.lora import LoRAConfig

    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    starts = [True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga", "pissa", "olora", "corda", "loftq", "x"]
    tried: list[dict[str, Any]] = [case for case, _ in REFUSED.values()]
    for config in [*tried, *({"init_lora_weights": start} for start in starts)]:
        try:
            helper.from_dict(plain | config).validate_legal(LoRAConfig(max_lora_rank=8))
        except Exception:
            assert list(peft_config.refusals(plain | config)), config
    assert not list(peft_config.refusals(plain | {"init_lora_weights": "eva"}))


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_finite_number_is_found_in_every_type(kind: str, value: float, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    folder = write(tmp_path / "adapter", tensors())
    weights = {name: torch.tensor(value).to(getattr(torch, kind)) for name, value in tensors().items()}
    save(weights, folder / WEIGHTS)
    check_directory(folder)
    weights[f"{Q}.lora_B.weight"][4, 1] = value
    save(weights, folder / WEIGHTS)
    with pytest.raises(MixfuseError, match=r"lora_B\.weight holds NaN or infinity"):
        check_directory(folder)
    save({name: tensor.to(torch.int64) for name, tensor in weights.items()}, folder / WEIGHTS)
    with pytest.raises(MixfuseError, match="is of type I64"):
        check_directory(folder)


@pytest.mark.parametrize("fill", [1e30, 1e4, 50.0])
def test_finite_weights_that_would_drown_the_base_are_refused(fill: float, base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors(fill))
    adapter.verify(folder)
    with pytest.raises(MixfuseError, match="times its own norm"):
        check_directory(folder, base=base)
    with pytest.raises(MixfuseError, match="more than any training does"):
        check_directory(folder)


def test_weights_are_held_to_the_engines_own_number_format(base: Path, tmp_path: Path) -> None:
    weights = tensors()
    weights[f"{Q}.lora_A.weight"] *= 1e-6
    weights[f"{Q}.lora_B.weight"][0, 0] = 1e5
    folder = write(tmp_path / "adapter", weights)
    check_directory(folder, base=base, dtype="bfloat16")
    with pytest.raises(MixfuseError, match="overflows float16"):
        check_directory(folder, base=base, dtype="float16")
    weights[f"{Q}.lora_B.weight"][0, 0] = 4e4  # times the scale of 2
    with pytest.raises(MixfuseError, match="overflows float16"):
        check_directory(write(tmp_path / "scaled", weights), base=base, dtype="float16")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["self_attn.q_proj"]},
        {"exclude_modules": ["lm_head"], "layers_to_transform": [0, 3]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"use_rslora": None, "modules_to_save": [], "bias": None, "task_type": None, "eva_config": {}},
    ],
)
def test_a_config_that_names_what_the_file_holds_passes(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors(), **config)
    adapter.verify(folder)
    adapter.check_applied(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["k_proj"]}, "its targets leave out"),
        ({"target_modules": "q_proj"}, "its targets leave out"),
        ({"exclude_modules": ["q_proj"]}, "its targets leave out"),
        ({"layers_to_transform": [1]}, "its targets leave out"),
        ({"target_modules": r"(?=(\w+\.?)+!)q"}, "its target_modules cannot be matched in linear time"),
        ({"layers_pattern": "(a+)+b", "layers_to_transform": 0}, "its layers_pattern cannot be matched"),
    ],
)
def test_targets_that_leave_out_what_the_file_holds_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "adapter", tensors(), **config)
    adapter.verify(folder)
    with pytest.raises(MixfuseError, match=message):
        adapter.check_applied(folder)
    assert main(["adapter", "verify", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_layer_with_some_of_its_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    weights = {
        experts.format(layer, expert, name, side): numpy.full((2, 8) if side == "A" else (8, 2), 0.05, numpy.float32)
        for layer in (0, 1)
        for expert in (0, 1)
        for name in ("w1", "w2", "w3")
        for side in "AB"
    }
    targets = {"target_modules": ["w1", "w2", "w3"]}
    assert main(["adapter", "verify", str(write(tmp_path / "whole", weights, experts_trained=True, **targets))]) == 0
    half = {name: value for name, value in weights.items() if "layers.1.block_sparse_moe.experts.1.w2" not in name}
    folder = write(tmp_path / "half", half, experts_trained=True, **targets)
    assert main(["adapter", "verify", str(folder)]) == 2
    assert "layers.1 has factors of some experts or projections only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"a|" * 1_900_000: 2}, "is no pattern"),
        ({f".*q{number}.?": 2 for number in range(257)}, "holds more than 256 patterns that are no plain names"),
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_beyond_a_limit_are_never_compiled(key: str, pattern: dict[str, int], message: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], key: pattern}
    (found,) = peft_config.refusals(config)
    assert message in found.what
    assert len(found.what) < 300


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "a|" * 1_900_000},
        {"target_modules": ["q_proj"], "exclude_modules": "((x{100}){100}){100}"},
        {"target_modules": ["q_proj"], "layers_pattern": [f"n{number}" for number in range(1000)]},
    ],
)
def test_targets_beyond_a_limit_are_never_matched(keys: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=list(keys)[-1]):
        peft_config.Targets(keys)
    assert not capfd.readouterr().err


def test_modules_are_targeted_as_peft_targets_them() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [
        f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate")
    ]
    for keys in (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.v_proj", "gate"], "exclude_modules": ["layers.1.mlp.gate"]},
        {"target_modules": r"model\.layers\.1.*"},
        {"target_modules": ["q_proj", "gate"], "exclude_modules": r".*\.1?1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11], "layers_pattern": ["layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ):
        theirs = peft.LoraConfig(**keys)
        for module in modules:
            found = check_target_module_exists(theirs, module)
            expected = bool(found) and type(found).__name__ != "_ExcludedModule"
            assert peft_config.Targets(keys).module(module) == expected, (keys, module)


def test_every_key_of_pefts_config_is_known() -> None:
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == peft_config.KNOWN_KEYS


@pytest.mark.parametrize("content", ['{"r": 2, "r": 4}', '{"a": {"b": 1, "b": 2}}'])
def test_a_key_that_stands_twice_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(MixfuseError, match="stands twice"):
        read_object(tmp_path / CONFIG, most=100)


@pytest.mark.parametrize("factor", [1e-30, 1e-12])
def test_a_change_too_small_for_any_number_format_is_none(factor: float, base: Path, tmp_path: Path) -> None:
    weights = tensors()
    weights[f"{Q}.lora_B.weight"] *= factor
    folder = write(tmp_path / "adapter", weights)
    for known in (base, None):
        with pytest.raises(MixfuseError, match="too small for float32, so the adapter does nothing"):
            check_directory(folder, base=known)


@pytest.mark.parametrize("side", "AB")
def test_an_adapter_that_does_nothing_is_never_right(side: str, base: Path, tmp_path: Path) -> None:
    weights = tensors()
    weights[f"{Q}.lora_{side}.weight"][:] = 0
    with pytest.raises(MixfuseError, match="does nothing"):
        check_directory(write(tmp_path / "adapter", weights), base=base)


def test_a_trained_adapter_of_ordinary_size_passes(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors(0.1), use_rslora=True)
    adapter.verify(folder)
    for dtype in ("float16", "bfloat16", "float32", None):
        check_directory(folder, base=base, dtype=dtype)
