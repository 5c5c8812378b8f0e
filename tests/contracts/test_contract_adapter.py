"""The adapter directory: whatever was changed, lost, added or made for another base is found and named."""

import json
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from mixfuse.app import config_reference
from mixfuse.contracts import adapter, signing
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest, TrustedKey
from mixfuse.contracts.adapter_weights import safetensors_header
from mixfuse.contracts.errors import MixfuseError

STEM = "base_model.model.model.layers.0"
Q, W1 = f"{STEM}.self_attn.q_proj", f"{STEM}.block_sparse_moe.experts.0.w1"


def write(folder: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    """An adapter directory of rank 2 around these tensors, its hashes right."""
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    (folder / "README.md").write_text("A card.")
    files = adapter.file_hashes(folder)
    defaults = {
        "role": "domain",
        "revision": adapter.revision_of(files),
        "base": dict.fromkeys(("config", "tokenizer", "chat_template", "weights"), "0" * 64),
        "base_path": "base",
        "rank": 2,
        "experts_trained": True,
        "files": files,
    }
    manifest = Manifest.model_validate(defaults | keys)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def factors(module: str, rank: int = 2) -> dict[str, Any]:
    return {
        f"{module}.lora_A.weight": numpy.ones((rank, 8), numpy.float32),
        f"{module}.lora_B.weight": numpy.ones((8, rank), numpy.float32),
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", factors(Q) | factors(W1))


def edit_manifest(directory: Path, **keys: Any) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_an_untouched_directory_passes_wherever_it_lies(directory: Path, tmp_path: Path) -> None:
    manifest = adapter.verify(directory)
    assert manifest.role == "domain"
    moved = directory.rename(tmp_path / "moved")
    assert adapter.verify(moved, base=manifest.base) == manifest


def _flip_a_byte(directory: Path) -> None:
    weights = bytearray((directory / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (directory / WEIGHTS).write_bytes(weights)


def _cut_off(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-8])


def _symlink(directory: Path) -> None:
    shutil.move(directory / WEIGHTS, directory.parent / "elsewhere")
    (directory / WEIGHTS).symlink_to(directory.parent / "elsewhere")


def _linked_folder(directory: Path) -> None:
    (directory / "more").symlink_to(directory.parent, target_is_directory=True)


def _code(directory: Path) -> None:
    (directory / "modeling.py").write_text("evil = True")
    edit_manifest(directory, files=adapter.file_hashes(directory))


def _hash(directory: Path) -> None:
    files = adapter.read_manifest(directory).files
    edit_manifest(directory, files=files | {CONFIG: "0" * 64})


def _rehashed(directory: Path) -> None:
    """Other weights, and hashes to match: the revision still says that it is another adapter."""
    _flip_a_byte(directory)
    edit_manifest(directory, files=adapter.file_hashes(directory))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (_flip_a_byte, f"{WEIGHTS} was changed after export"),
    "weights cut off": (_cut_off, f"{WEIGHTS} was changed after export"),
    "another config": (lambda d: (d / CONFIG).write_text("{}"), f"{CONFIG} was changed after export"),
    "another card": (lambda d: (d / "README.md").write_text("Better!"), "README.md was changed after export"),
    "a missing file": (lambda d: (d / CONFIG).unlink(), f"{CONFIG} is missing"),
    "an extra file": (lambda d: (d / "extra.json").write_text("{}"), "extra.json is not in the manifest"),
    "an extra file below": (lambda d: ((d / "sub").mkdir(), (d / "sub" / "x").touch()), "sub/x is not in the manifest"),
    "a link to a folder": (_linked_folder, "more is not in the manifest"),
    "a link for a file": (_symlink, f"{WEIGHTS} was changed after export"),
    "code": (_code, "modeling.py: only safetensors, JSON and Markdown"),
    "an edited hash": (_hash, f"{CONFIG} was changed after export"),
    "new hashes": (_rehashed, "the revision does not match the files"),
    "an edited revision": (lambda d: edit_manifest(d, revision="f" * 12), "the revision does not match the files"),
    "an edited rank": (lambda d: edit_manifest(d, rank=4), "rank 2 in adapter_config.json, 4 in the manifest"),
    "hidden experts": (lambda d: edit_manifest(d, experts_trained=False), "the manifest says otherwise"),
    "an unknown key": (lambda d: edit_manifest(d, rolle="judge"), "unknown key 'rolle'; did you mean 'role'?"),
    "another schema": (lambda d: edit_manifest(d, schema_version=4, new=1), "has schema version 4"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "mixfuse adapter export"),
    "half a manifest": (lambda d: (d / MANIFEST).write_text("{"), "not valid JSON"),
    "no directory": (shutil.rmtree, "no such adapter directory"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_changed_is_named_in_one_line(case: str, directory: Path) -> None:
    tamper, message = TAMPERED[case]
    tamper(directory)
    with pytest.raises(MixfuseError) as caught:
        adapter.verify(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        (factors(Q) | factors(W1, rank=4), "does not fit rank 2"),
        (factors(Q) | {f"{W1}.lora_A.weight": numpy.ones((2, 8), numpy.float32)}, "stands without"),
        (factors(Q) | {f"{W1}.lora_A.weight": numpy.ones((2, 0), numpy.float32)}, "does not fit rank 2"),
        (factors(Q), "holds 0 expert tensors, the manifest says otherwise"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=message):
        adapter.verify(write(tmp_path / "adapter", tensors))


@pytest.mark.parametrize("part", ["config", "tokenizer", "chat_template", "weights"])
def test_an_adapter_of_another_base_is_refused_and_the_difference_named(part: str, directory: Path) -> None:
    base = adapter.verify(directory).base.model_copy(update={part: "1" * 64})
    with pytest.raises(MixfuseError, match=rf"another base model \(its {part} differ\)"):
        adapter.verify(directory, base=base)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        b"\xff" * 16,
        b"\x02\0\0\0\0\0\0\0[]",
        b'\x0a\0\0\0\0\0\0\0{"a":{"b"}',
        b'\x08\0\0\0\0\0\0\0{"a": 1}',
    ],
)
def test_what_is_no_safetensors_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(MixfuseError, match="not a whole safetensors file"):
        safetensors_header(tmp_path / "x.safetensors")


def test_a_safetensors_file_cut_off_or_lengthened_is_not_whole(directory: Path) -> None:
    path = directory / WEIGHTS
    whole = path.read_bytes()
    assert safetensors_header(path)[f"{Q}.lora_A.weight"]["shape"] == [2, 8]
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(MixfuseError, match="not a whole safetensors file"):
            safetensors_header(path)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signing.generate(tmp_path / "keys" / "mine")
    return tmp_path / "keys" / "mine"


def test_a_signed_manifest_is_taken_by_who_trusts_its_key(directory: Path, key: Path) -> None:
    before = adapter.verify(directory)
    assert adapter.sign(directory, key).revision == before.revision
    public = key.with_name("mine.pub")
    other = signing.generate(key.with_name("other"))
    for trusted in ((), (public,), (public.read_bytes(),), (other, public)):
        assert adapter.verify(directory, trusted=trusted).signature is not None
    with pytest.raises(MixfuseError, match="which is not a trusted one"):
        adapter.verify(directory, trusted=(other,))
    adapter.sign(directory, key.with_name("other"))
    assert adapter.verify(directory, trusted=(other,)).files == before.files


def test_a_key_is_trusted_until_its_day_and_not_once_it_is_revoked(directory: Path, key: Path) -> None:
    adapter.sign(directory, key)
    public, today = key.with_name("mine.pub"), datetime.now(UTC).date()
    other = signing.generate(key.with_name("other"))
    for until in (None, today, today + timedelta(days=1)):
        trusted = (other, TrustedKey(key=public, until=until))
        assert adapter.verify(directory, trusted=trusted, revoked=(other,)).signature is not None
    past = TrustedKey(key=public, until=today - timedelta(days=1))
    with pytest.raises(MixfuseError, match=f"trusted until {past.until}; sign it with another"):
        adapter.verify(directory, trusted=(past, other))
    for trusted in ((), (public,), (past,)):
        with pytest.raises(MixfuseError, match="which was revoked"):
            adapter.verify(directory, trusted=trusted, revoked=(public,))


def test_where_a_signature_is_demanded_an_unsigned_directory_is_refused(directory: Path, key: Path) -> None:
    with pytest.raises(MixfuseError, match="is not signed, and a signature is demanded"):
        adapter.verify(directory, trusted=(key.with_name("mine.pub"),))


@pytest.mark.parametrize(
    "change",
    [
        {"role": "judge"},
        {"metrics": {"accuracy": 1.0}},
        {"base_path": "elsewhere"},
        {"training_data": [{"name": "clean.jsonl"}]},
        {"role": "\u20ac"},
    ],
    ids=str,
)
def test_what_was_changed_after_signing_is_refused_whoever_is_trusted(
    change: dict[str, Any], directory: Path, key: Path
) -> None:
    adapter.sign(directory, key)
    edit_manifest(directory, **change)
    for trusted in ((), (key.with_name("mine.pub"),)):
        with pytest.raises(MixfuseError, match="changed after it was signed"):
            adapter.verify(directory, trusted=trusted)


def test_a_forger_with_a_key_of_his_own_is_not_trusted(directory: Path, key: Path) -> None:
    adapter.sign(directory, key)
    edit_manifest(directory, role="judge", signature=None)
    signing.generate(key.with_name("forger"))
    adapter.sign(directory, key.with_name("forger"))
    with pytest.raises(MixfuseError, match="not a trusted one"):
        adapter.verify(directory, trusted=(key.with_name("mine.pub"),))
    # Naming the trusted key beside his own signature does not help.
    signature = json.loads((directory / MANIFEST).read_text())["signature"]
    trusted = signing.public_key(key.with_name("mine.pub")).public_bytes_raw().hex()
    edit_manifest(directory, signature=signature | {"public_key": trusted})
    with pytest.raises(MixfuseError, match="changed after it was signed"):
        adapter.verify(directory, trusted=(key.with_name("mine.pub"),))


def test_what_is_not_right_is_not_signed(directory: Path, key: Path) -> None:
    _flip_a_byte(directory)
    with pytest.raises(MixfuseError, match="was changed after export"):
        adapter.sign(directory, key)
    assert adapter.read_manifest(directory).signature is None


def test_keys_are_made_for_their_owner_and_never_overwritten(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(MixfuseError, match="exists already"):
        signing.generate(key)
    key.unlink()
    with pytest.raises(MixfuseError, match=r"mine\.pub exists already"):
        signing.generate(key)


def test_a_file_that_is_no_key_is_named(directory: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for wrong in (tmp_path / "text", key.with_name("mine.pub")):
        with pytest.raises(MixfuseError, match="no unencrypted Ed25519 private key"):
            adapter.sign(directory, wrong)
    with pytest.raises(MixfuseError, match="the key cannot be read: no such file"):
        adapter.sign(directory, tmp_path / "nowhere")
    adapter.sign(directory, key)
    for wrong in (tmp_path / "text", key, key.read_bytes()):
        with pytest.raises(MixfuseError, match="no Ed25519 public key"):
            adapter.verify(directory, trusted=(wrong,))


def test_a_manifest_of_the_first_version_is_read_and_upgraded(directory: Path) -> None:
    data = json.loads((directory / MANIFEST).read_text())
    added = {"calibration", "training_data", "signature", "model_type"}
    first = {key: value for key, value in data.items() if key not in added} | {"schema_version": 1}
    first["base"] = {key: value for key, value in data["base"].items() if value is not None}
    parity = {"max_abs_logprob_difference": 1e-5, "tolerance": 1e-3, "adapter_effect": 1.0, "expert_effect": None}
    first["parity"] = parity | {"tokens": 9, "dtype": "float32", "engine": "vllm"}
    (directory / MANIFEST).write_text(json.dumps(first))
    manifest = adapter.verify(directory)
    assert manifest.schema_version == adapter.SCHEMA_VERSION
    assert manifest.model_type == "mixtral"
    assert manifest.parity is not None
    # Its base is known by the old parts alone, whatever more a fingerprint holds today.
    assert adapter.verify(directory, base=manifest.base.model_copy(update={"weight_files": {"a.safetensors": 1}}))


ROOT = Path(__file__).parents[2]
PAGE, SCHEMA = ROOT / "docs" / "adapter-directory.md", ROOT / "docs" / "adapter-manifest.schema.json"


def test_the_page_and_the_schema_are_the_models() -> None:
    """Written anew by `python -m mixfuse.app.config_reference` and both files' names."""
    assert config_reference.rewritten(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == config_reference.schema(Manifest)
    for model in (*config_reference.models_in(Manifest), *config_reference.models_in(adapter.Probes)):
        assert config_reference.meanings(model).keys() == model.model_fields.keys(), model


def test_the_published_schema_takes_what_is_written_and_nothing_else(directory: Path, key: Path) -> None:
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    check.check_schema(check.schema)
    adapter.sign(directory, key)
    data = json.loads((directory / MANIFEST).read_text())
    check.validate(data)
    for wrong in (data | {"rolle": "judge"}, data | {"files": {}}, data | {"rank": "two"}, {}):
        assert not check.is_valid(wrong)


def test_a_revision_is_of_weights_and_config_and_not_of_the_card() -> None:
    files = {WEIGHTS: "a", CONFIG: "b", "README.md": "c"}
    assert adapter.revision_of(files | {"README.md": "d"}) == adapter.revision_of(files)
    assert adapter.revision_of(files | {WEIGHTS: "d"}) != adapter.revision_of(files)
    assert adapter.revision_of(files | {CONFIG: "d"}) != adapter.revision_of(files)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "hidden_size": 8, "use_cache": True}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tensor = numpy.arange(200_000, dtype=numpy.float32)
    save_file({"w": tensor}, folder / "model.safetensors")
    return folder


def _tensor(base: Path, index: int) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["w"][index] = -1
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda b: (b / "config.json").write_text('{"model_type": "mixtral", "hidden_size": 16}'), "config"),
        (lambda b: (b / "tokenizer.json").write_text('{"a": 1}'), "tokenizer"),
        (lambda b: (b / "chat_template.jinja").write_text("{{ messages }} "), "chat_template"),
        (lambda b: _tensor(b, 0), "weights"),
        (lambda b: _tensor(b, 100_000), "weights"),
        (lambda b: _tensor(b, -1), "weights"),
        (lambda b: save_file({"v": load_file(b / "model.safetensors")["w"]}, b / "model.safetensors"), "weights"),
        (lambda b: (b / "model.safetensors").rename(b / "other.safetensors"), "weight_files"),
    ],
)
def test_a_fingerprint_tells_bases_apart_by_part(change: Callable[[Path], object], part: str, base: Path) -> None:
    before = adapter.fingerprint(base).model_dump()
    change(base)
    after = adapter.fingerprint(base).model_dump()
    assert {key for key in before if before[key] != after[key]} == {part}


def test_an_exact_fingerprint_sees_a_byte_that_no_sample_holds_and_not_the_sharding(base: Path) -> None:
    before = adapter.fingerprint(base, exact=True)
    assert before.differences(adapter.fingerprint(base)) == []
    _tensor(base, 50_000)
    after = adapter.fingerprint(base, exact=True)
    assert before.differences(after) == ["tensors"]
    tensors = load_file(base / "model.safetensors")
    save_file({"v": tensors["w"]}, base / "a.safetensors")
    whole = adapter.fingerprint(base, exact=True)
    save_file({"v": tensors["w"], "w": tensors["w"]}, base / "model.safetensors")
    (base / "a.safetensors").unlink()
    assert "tensors" not in whole.differences(adapter.fingerprint(base, exact=True))


def test_a_fingerprint_passes_over_what_does_not_change_the_model(base: Path) -> None:
    before = adapter.fingerprint(base)
    config = {"model_type": "mixtral", "hidden_size": 8, "use_cache": False, "transformers_version": "9", "dtype": "x"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert adapter.fingerprint(base) == before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_base_that_lacks_a_part_is_named(missing: str, base: Path) -> None:
    (base / missing).unlink()
    with pytest.raises(MixfuseError, match=r"no such file|no \.safetensors weights"):
        adapter.fingerprint(base)


PROBE = {"tokens": [1, 2, 3], "logprobs": [-1.0, -2.0]}
VERDICT = {"messages": [{"role": "user", "content": "A or B?"}], "p": 0.8}
MEASURED = {"logprobs": [[-1.0, -2.0]], "base": [[-1.5, -2.5]]}


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({}, None),  # of a file of an earlier version
        ({"verdicts": [0.7]}, None),
        ({"verdicts": [0.7, 0.7]}, "another number of verdicts"),
        ({"verdicts": [1.1]}, "less than or equal to 1"),
        ({"verdicts": [float("nan")]}, "finite"),
        ({"logprobs": [], "base": []}, "another number of prompts"),
    ],
)
def test_what_an_engine_said_fits_the_probes(measured: dict[str, Any], words: str | None) -> None:
    data = {
        "tolerance": 1e-3,
        "logprobs": [PROBE],
        "verdicts": [VERDICT],
        "measured": {"bfloat16": MEASURED | measured},
    }
    if words is None:
        assert adapter.Probes.model_validate(data).measured["bfloat16"].verdicts == measured.get("verdicts", [])
        return
    with pytest.raises(ValidationError, match=words):
        adapter.Probes.model_validate(data)
