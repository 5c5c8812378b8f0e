"""What an adapter file may be: bounded, regular, of known shapes, and of weights that an engine can bear."""

import dataclasses
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter, peft_config
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest
from mixfuse.contracts.adapter_weights import Tensors, check_directory, safetensors_header
from mixfuse.contracts.bounded_json import read_object
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.model_card import CARD, named, render

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
    "many tensors": (header("{" + ",".join(f'"{i}":{FLAT}' for i in range(200_001)) + "}"), "more than 100000 tensors"),
    "much metadata": (
        header('{"__metadata__": {' + ",".join(f'"{i}":"x"' for i in range(10_001)) + "}}"),
        "more than 10000 keys that are of no tensor",
    ),
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


LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # hashing a terabyte takes far longer
from mixfuse.cli.entry import main
sys.exit(main(sys.argv[1:]))
"""


def limited(*words: object) -> tuple[int, str]:
    """Runs a command in little processor time: its exit status, and what it says of an error."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "README.md"])
def test_a_file_of_a_terabyte_is_never_hashed(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    (folder / "README.md").touch()
    hashed(folder)
    os.truncate(folder / name, 1 << 40)
    status, said = limited("adapter", "verify", folder)
    assert status == 2, said
    assert f"{name} is larger than" in said
    assert said.count("\n") == 1


def test_weights_larger_than_their_header_says_are_never_hashed(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    os.truncate(folder / WEIGHTS, 1 << 37)
    status, said = limited("adapter", "verify", folder)
    assert status == 2, said
    assert "not a whole safetensors file (truncated)" in said


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_a_folder_of_many_files_is_not_looked_through(make: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    for number in range(2000):
        getattr(folder / f"{number}.md", make)()
    with pytest.raises(MixfuseError, match=r"is not in the manifest|holds more than 1004 files and folders"):
        adapter.verify(folder)


@contextmanager
def nobody() -> Iterator[None]:
    """Runs the block without root's permission to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [".", MANIFEST, CONFIG, WEIGHTS])
def test_what_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        folder = Path(shutil.copytree(write(tmp_path / "adapter", tensors()), Path(root, "adapter")))
        (folder / name).chmod(0)
        with nobody(), pytest.raises(MixfuseError, match="cannot be read: Permission denied") as caught:
            adapter.verify(folder)
        (folder / name).chmod(0o755)
    assert caught.value.kind == "adapter"


@pytest.mark.parametrize("path", ["x" * 5000, "x/" * 3000])
def test_a_path_that_no_file_can_have_is_one_short_line(path: str) -> None:
    for read in (adapter.verify, adapter.read_manifest, adapter.read_probes, adapter.check_applied, check_directory):
        with pytest.raises(MixfuseError, match="cannot be read: File name too long") as caught:
            read(Path(path))
        assert len(str(caught.value)) < 300
        assert caught.value.kind == "adapter"


def test_weights_that_shrink_while_they_are_read_are_refused(tmp_path: Path) -> None:
    weights = Tensors(write(tmp_path / "adapter", tensors()) / WEIGHTS)
    os.truncate(weights.path, weights.path.stat().st_size - 4)
    with pytest.raises(MixfuseError, match="changed while it was being read"):
        weights.read(list(weights.header)[-1])


PROBES = {
    "a token below 0": ({"logprobs": [{"tokens": [-1, 2], "logprobs": [0.5]}]}, "greater than or equal to 0"),
    "a token of no vocabulary": ({"logprobs": [{"tokens": [1 << 31, 2], "logprobs": [0.5]}]}, "less than 2147483648"),
    "a million tokens": (
        {"logprobs": [{"tokens": [1] * 200_000, "logprobs": [0.5] * 199_999}]},
        "more than 131072 tok",
    ),
    "many prompts": ({"logprobs": [{"tokens": [1, 2], "logprobs": [0.5]}] * 5000}, "at most 1024 items"),
    "a missing logprob": ({"logprobs": [{"tokens": [1, 2], "logprobs": []}]}, "needs a log-probability"),
}


@pytest.mark.parametrize("case", PROBES)
def test_probes_that_no_engine_could_answer_are_refused_before_one_loads_the_adapter(case: str, tmp_path: Path) -> None:
    probes, message = PROBES[case]
    folder = write(tmp_path / "adapter", tensors())
    (folder / adapter.PROBES).write_text(json.dumps({"tolerance": 0.001, **probes}))
    with pytest.raises(MixfuseError, match=message):
        adapter.verify(hashed(folder))


@pytest.mark.parametrize("key", ["recipe", "metrics", "libraries", "base_path"])
def test_half_a_character_is_refused_wherever_it_stands(key: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    data = json.loads((folder / MANIFEST).read_text())
    half = "\ud800"
    data[key] = half if key == "base_path" else {half: half} if key == "recipe" else {"a": half}
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(MixfuseError, match=r"half a surrogate pair, \\ud800"):
        adapter.read_manifest(folder)
    data[key] = "\U0001f600" if key == "base_path" else {"a": "\U0001f600"}  # written as two halves
    (folder / MANIFEST).write_text(json.dumps(data))
    adapter.read_manifest(folder)


@pytest.mark.parametrize("name", [b"\xff.json", b"a\x1b[2J.json", "\u202egnp.json".encode()])
def test_a_message_names_a_file_without_what_steers_a_terminal(name: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
    with pytest.raises(MixfuseError, match="is not in the manifest") as caught:
        adapter.verify(folder)
    assert str(caught.value).isprintable()
    assert str(caught.value).encode()


@pytest.mark.parametrize(
    "keys",
    [
        {f"key{number}": 1 for number in range(150_000)},
        {"files": {f"{number}.json": 1 for number in range(150_000)}},
    ],
)
def test_many_mistakes_in_a_manifest_are_one_line_and_little_memory(keys: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | keys))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MixfuseError, match=r"unknown key 'key0'|lists more than 10000 files"):
        adapter.read_manifest(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 << 10


@pytest.mark.parametrize("role", ["", "\x1b[2J", "a\x00", "x" * 201])
def test_a_role_that_no_screen_can_show_is_refused(role: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | {"role": role}))
    with pytest.raises(MixfuseError, match="'role'"):
        adapter.read_manifest(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: Path(path).symlink_to("/dev/zero")])
def test_a_key_that_is_no_file_is_refused_and_never_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "key")
    folder = write(tmp_path / "adapter", tensors())
    with pytest.raises(MixfuseError, match="the key cannot be read: is no regular file"):
        adapter.sign(folder, tmp_path / "key")


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe for a config": (lambda b: _fifo(b / "config.json"), "is no regular file"),
    "a config of a terabyte": (lambda b: os.truncate(b / "config.json", 1 << 40), "larger than 4 MiB"),
    "a config that is a list": (lambda b: (b / "config.json").write_text("[1]"), "holds no JSON object, but a list"),
    "a tokenizer of a terabyte": (lambda b: os.truncate(b / "tokenizer.json", 1 << 40), "larger than 256 MiB"),
    "settings that are a list": (lambda b: (b / "tokenizer_config.json").write_text("[]"), "but a list"),
    "half a character": (
        lambda b: (b / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}'),
        "half a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_is_none_is_one_line(case: str, base: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    adapter.fingerprint(base)
    spoil, message = BASES[case]
    spoil(base)
    with pytest.raises(MixfuseError, match=message):
        adapter.fingerprint(base)


@pytest.mark.parametrize(
    ("module", "size", "message"),
    [
        ("model.layers.7.self_attn.q_proj", 8, "of shape [8, 8], which the base does not have"),
        ("model.layers.0.self_attn.q_proj", 7, "of shape [8, 7], whose weight has shape [8, 8] in the base"),
    ],
)
def test_a_change_that_fits_no_weight_of_the_base_is_refused(
    module: str, size: int, message: str, base: Path, tmp_path: Path
) -> None:
    stem = f"base_model.model.{module}"
    weights = {
        f"{stem}.lora_A.weight": numpy.full((2, size), 0.05, numpy.float32),
        f"{stem}.lora_B.weight": numpy.full((8, 2), 0.05, numpy.float32),
    }
    folder = write(tmp_path / "adapter", weights)
    check_directory(folder)
    with pytest.raises(MixfuseError, match=re.escape(message)):
        check_directory(folder, base=base)


def test_a_tensor_of_a_long_name_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name.replace("layers.0", "layers." + "9" * 5000): value for name, value in tensors().items()}
    folder = write(tmp_path / "adapter", weights, target_modules=["k_proj"])
    adapter.verify(folder)
    assert main(["adapter", "verify", str(folder)]) == 2
    assert len(capsys.readouterr().err) < len(str(folder)) + 550
    folder = write(tmp_path / "odd", {"x" * 100_000: numpy.ones((3, 3), numpy.float32)})
    with pytest.raises(MixfuseError, match="xxx…") as caught:
        adapter.verify(folder)
    assert len(str(caught.value)) < len(str(folder)) + 550


def test_adapters_of_other_bases_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    weights = {name: value[:, :6] if "lora_A" in name else value for name, value in tensors().items()}
    one = write(tmp_path / "one", tensors())
    other = write(tmp_path / "other", {name: numpy.ascontiguousarray(value) for name, value in weights.items()})
    assert main(["adapter", "diff", str(one), str(other)]) == 2
    assert "by matrices of other shapes" in capsys.readouterr().err


CARDS = {
    "not UTF-8": (b"---\nlicense: \xff\n---\n", None),
    "references that expand": (b"---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n", None),
    "a date that is none": (b"---\nday: 2024-99-99\n---\n", None),
    "nested": (b"---\nx: " + b"[" * 5000 + b"]" * 5000 + b"\n---\n", "nested too deep"),
    "an object": (b"---\nx: !!python/object:os.system [1]\n---\n", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_of_any_text_is_read_or_named(case: str, tmp_path: Path) -> None:
    content, message = CARDS[case]
    folder = write(tmp_path / "adapter", tensors())
    (folder / CARD).write_bytes(content)
    if message is None:
        assert named(folder) == (None, "\ufffd" if case == "not UTF-8" else None)
    else:
        with pytest.raises(MixfuseError, match=message):
            named(folder)


def test_a_card_is_written_of_whatever_a_manifest_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tensors())
    manifest = adapter.read_manifest(folder).model_copy(
        update={
            "role": "judge",
            "judge_protocol": {"verdicts": 5, "orders": [], "version": {}},
            "recipe": {"evaluation": {"data": [1, None, {"path": [1]}]}},
            "libraries": {"a\x1b[2J": "b\x9b1m"},
        }
    )
    assert all(line.isprintable() for line in render(manifest).split("\n"))
