"""A merged checkpoint is the base's, byte by byte, but for what the adapter changes; in a memory that does not grow."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter as contract
from mixfuse.contracts.adapter_weights import safetensors_header
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.train.adapters import merge_into_base as merging
from mixfuse.train.adapters.export import export, write_directory
from mixfuse.train.adapters.layouts import Layout
from mixfuse.train.adapters.merge_into_base import RECORD, merge


@pytest.fixture(scope="module")
def half(tiny_base: Path, peft_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny base in bfloat16 and in several files, and an adapter directory of it."""
    root = tmp_path_factory.mktemp("half")
    model = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, root / "base")
    export(peft_adapter(), root / "adapter", base=root / "base")
    assert len(list((root / "base").glob("*.safetensors"))) > 3
    return root / "base", root / "adapter"


def test_a_merged_model_says_in_plain_transformers_what_the_adapter_says(
    adapter_directory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    merged = merge(adapter_directory, tmp_path / "out")
    wanted = harness.logits(tiny_base, adapter_directory / "peft")
    torch.testing.assert_close(harness.logits(tmp_path / "out"), wanted, rtol=0, atol=1e-4)
    assert merged.check is not None
    assert merged.check.difference < 1e-4 < 0.1 < merged.check.effect
    assert merged.tensors == 2 * (4 + 4 * 3)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / RECORD).read_text())["adapter"] == contract.verify(adapter_directory).revision


def test_every_file_is_the_bases_but_for_what_the_adapter_changes(half: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = half
    merge(adapter, tmp_path / "out", check=False)
    changes = harness.deltas(adapter)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {RECORD}
    for path in base.glob("*.safetensors"):
        assert safetensors_header(path) == safetensors_header(tmp_path / "out" / path.name)
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        for name, tensor in before.items():
            if name in changes:
                # Added in float32, rounded once.
                wanted = (tensor.double() + changes.pop(name)).to(torch.bfloat16)
                assert (after[name] != wanted).float().mean() < 1e-3
                torch.testing.assert_close(after[name], wanted, rtol=2**-7, atol=0)
            else:
                assert torch.equal(after[name], tensor)
    assert not changes, "not everything was merged"


def test_the_check_knows_what_rounding_to_the_bases_type_has_changed(half: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = half
    check = merge(adapter, tmp_path / "out").check
    assert check is not None
    assert check.difference < 1e-3 < check.rounding < check.effect
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    assert base.is_dir()


def test_an_interrupted_merge_goes_on_with_the_files_that_are_missing(
    half: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = half
    merge_file, begun = merging._merge_file, []

    def interrupted(file: Any, stream: Any, *arguments: Any) -> None:
        begun.append(file.path.name)
        if len(begun) == 3:
            stream.write(b"half a file")
            raise KeyboardInterrupt
        merge_file(file, stream, *arguments)

    monkeypatch.setattr(merging, "_merge_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    left = {path.name for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert left == set(begun[:2])
    (tmp_path / "out.partial" / ".model.x.partial").write_text("left by a process that was killed")
    # Another adapter's merge does not take them for its own.
    other = shutil.copytree(adapter, tmp_path / "judge")
    manifest = json.loads((other / contract.MANIFEST).read_text())
    (other / contract.MANIFEST).write_text(json.dumps(manifest | {"role": "judge"}))
    with pytest.raises(MixfuseError, match=r"out\.partial belongs to another merge"):
        merge(other, tmp_path / "out")

    begun.clear()
    begun += ["done"] * 3  # no further interruption
    merge(adapter, tmp_path / "out", check=False)
    assert not left & set(begun), "a finished file was written again"
    merge(adapter, tmp_path / "whole", check=False)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"judge", "out", "whole"}
    assert base.is_dir()


def test_ctrl_c_leaves_what_the_same_command_goes_on_from(half: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["adapter", "merge", half[1], tmp_path / "out", "--no-check"]
    # It pauses after the first file, where it can be interrupted.
    code = (
        "import signal, sys, time\nfrom mixfuse.cli.entry import main\n"
        "from mixfuse.train.adapters import merge_into_base as merge\n"
        # A shell that starts the tests in the background has its children ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "whole = merge._merge_file\n"
        "def slowly(file, *rest):\n    whole(file, *rest)\n    print('one', flush=True)\n    time.sleep(60)\n"
        "merge._merge_file = slowly\nsys.exit(main(sys.argv[1:]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=harness.ENVIRONMENT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "one\n"
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command continues" in error
    assert not list((tmp_path / "out.partial").glob(".*")), "half a file was left"
    assert main(list(map(str, arguments))) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_a_file_that_was_spoiled_in_between_is_found_by_the_check(
    half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = half
    merge(adapter, tmp_path / "out", check=False)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    for path in (tmp_path / "out.partial").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if ".experts.2." in name:
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
    assert main(["adapter", "merge", str(adapter), str(tmp_path / "out")]) == 2
    assert "the merged model's log-probs differ from PEFT's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_the_base_does_not_fit_the_check_is_left_out_and_says_so(
    half: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merging, "_CHECK_MEMORY", 1e12)
    assert main(["adapter", "merge", str(half[1]), str(tmp_path / "out")]) == 0
    assert "not compared with PEFT: it would take about" in capsys.readouterr().out


def _quantised(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        tensors = {name: t.to(torch.float8_e4m3fn) if ".w1." in name else t for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def _other_names(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items()}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_quantised, r"w1\.weight is quantised \(F8_E4M3\)"),
        (_other_names, "not in Mixtral's own names"),
        (lambda base: (base / "config.json").unlink(), "is not here; name it with --base"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused_before_anything_is_written(
    change: Any, message: str, half: tuple[Path, Path], peft_adapter: Any, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(half[0], tmp_path / "base"))
    change(base)
    adapter = half[1]
    if (base / "config.json").is_file():
        export(peft_adapter(), tmp_path / "adapter", base=base)
        adapter = tmp_path / "adapter"
    with pytest.raises(MixfuseError, match=message):
        merge(adapter, tmp_path / "out", base=base)
    assert not list(tmp_path.glob("out*"))


def test_another_base_and_a_place_that_is_taken_are_refused(
    half: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(MixfuseError, match=r"made on another base model \(its .*weights"):
        merge(half[1], tmp_path / "out", base=tiny_base)
    with pytest.raises(MixfuseError, match="exists already"):
        merge(half[1], tmp_path)


HIDDEN, INNER, EXPERTS = 512, 1024, 4


def _deep(root: Path, layers: int) -> Path:
    """A base of that many layers, 13 MB each in bfloat16, one to a file, and an adapter directory of it."""
    base = root / "base"
    base.mkdir(parents=True)
    sizes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    factors = {}
    index = {}
    for layer in range(layers):
        tensors = {}
        for expert in range(EXPERTS):
            for projection, (out, wide) in sizes.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"
                tensors[name] = torch.full((out, wide), 0.5, dtype=torch.bfloat16)
                for side, size in (("A", (4, wide)), ("B", (out, 4))):
                    stem = f"base_model.model.model.layers.{layer}"
                    factors[MIXTRAL.factor_name(stem, expert, projection, side)] = torch.full(size, 0.25)
        file = f"model-{layer:05}.safetensors"
        save_file(tensors, base / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": layers}))
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    layout = Layout(MIXTRAL, factors, config, None)
    write_directory(root / "adapter", layout, base, contract.fingerprint(base), role="domain", source=root)
    return root


def _peak(root: Path) -> int:
    """Bytes that a merge holds at most, beside what was there before it began."""
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom mixfuse.train.adapters.merge_into_base import merge\n"
        # Not getrusage: its maximum outlives exec, and so would be the parent's.
        "def kilobytes(key):\n"
        "    return int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "root, before = Path(sys.argv[1]), kilobytes('VmRSS')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # resets VmHWM
        "merge(root / 'adapter', root / 'out', base=root / 'base', check=False)\n"
        "print((kilobytes('VmHWM') - before) * 1024)"
    )
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_memory_of_a_merge_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    few, many = _deep(tmp_path / "few", 2), _deep(tmp_path / "many", 8)
    grown = 6 * EXPERTS * 3 * HIDDEN * INNER * 2
    peaks = _peak(few), _peak(many)
    assert abs(peaks[1] - peaks[0]) < grown / 3, peaks
    # The formula of docs/adapter-directory.md.
    assert peaks[1] < 5 * merging._BLOCK_BYTES + 4 * 4 * (HIDDEN + INNER) * 3 + (64 << 20), peaks
    name = f"model.layers.7.block_sparse_moe.experts.{EXPERTS - 1}.w2.weight"
    merged = load_file(tmp_path / "many" / "out" / "model-00007.safetensors")[name]
    assert (merged == 0.5 + 4 * 0.25 * 0.25).all()
