"""What an adapter file may be: bounded, regular, of known shapes, and of weights that an engine can bear."""

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

from mixfuse.contracts import adapter, peft_config
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest
from mixfuse.contracts.adapter_weights import check_directory, safetensors_header
from mixfuse.contracts.errors import MixfuseError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
BASE_STD = 0.02


def tensors(fill: float = 0.05) -> dict[str, Any]:
    random = numpy.random.default_rng(0)
    return {
        f"{Q}.lora_A.weight": (random.standard_normal((2, 8)) * fill).astype(numpy.float32),
        f"{Q}.lora_B.weight": (random.standard_normal((8, 2)) * fill).astype(numpy.float32),
    }


def write(folder: Path, weights: dict[str, Any], **config: Any) -> Path:
    """An adapter directory of rank 2, its hashes right."""
    folder.mkdir()
    save_file(weights, folder / WEIGHTS)
    keys = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(keys | config))
    return hashed(folder)


def hashed(folder: Path) -> Path:
    (folder / MANIFEST).unlink(missing_ok=True)
    files = adapter.file_hashes(folder)
    manifest = Manifest(
        role="domain",
        revision=adapter.revision_of(files),
        base=adapter.Fingerprint(config="0", tokenizer="0", chat_template="0", weights="0"),
        base_path="base",
        rank=2,
        experts_trained=False,
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
    "no method": ({"peft_type": None}, "only LoRA can be served"),
    "rank 0": ({"r": 0}, "0 for the rank 'r'"),
    "a rank that is text": ({"r": "2"}, "'2' for the rank 'r'"),
    "no alpha": ({"lora_alpha": None}, "has no 'lora_alpha'"),
    "alpha true": ({"lora_alpha": True}, "has no 'lora_alpha'"),
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
    "a pattern that is a list": ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "rank_pattern '(' is no pattern"),
    "targets that are no names": ({"target_modules": [1]}, "target_modules are not all names"),
    "a parameter that is text": ({"target_parameters": "experts"}, "target_parameters are no list"),
    "a rank above vLLM's": ({"r": 1024}, "its rank is 1024; vLLM serves ranks up to 512"),
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
