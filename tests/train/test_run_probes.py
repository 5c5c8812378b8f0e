"""Every adapter that is exported from a run has probes, which are what PEFT says of it; another base's are left out."""

import json
import shutil
from pathlib import Path

import pytest
from train_harness import Run

from mixfuse.contracts import adapter as contract
from mixfuse.train.adapters import parity
from mixfuse.train.adapters.export import export


@pytest.mark.parametrize("name", ["sft_by_two", "judge_by_two"])
def test_an_exported_run_has_probes(name: str, request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> None:
    """Of the adapter that is kept: the best one, where an evaluation was better than the last."""
    run: Run = request.getfixturevalue(name)
    out = tmp_path / "adapter"
    manifest = export(run.out, out)
    contract.verify(out)
    probes = contract.read_probes(out)
    assert probes is not None
    assert probes.precision == "float32"
    # The texts behind several beginnings are `verify`'s alone: 288 more passes would be too many for a run's end.
    wanted = parity.reference(out, tiny_base, length=256).without_repeats()
    assert [probe.tokens for probe in probes.logprobs] == [probe.tokens for probe in wanted.probes().logprobs], (
        "a swap would be asked other prompts than `verify` compares"
    )
    for ours, theirs in zip(probes.logprobs, wanted.probes().logprobs, strict=True):
        assert parity.worst_difference([ours.logprobs, ours.base], [theirs.logprobs, theirs.base]) < 1e-3
    assert manifest.effect is not None
    assert manifest.effect.median > 0
    # Exported once more, it keeps them.
    export(out, tmp_path / "again")
    assert contract.read_probes(tmp_path / "again") == probes


def test_probes_of_another_base_are_left_out(
    sft_by_two: Run, tiny_base: Path, tmp_path: Path, embedded: object
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x00\x3f" if data[-2:] != b"\x00\x3f" else b"\x00\x3e"
    weights.write_bytes(data)
    out = tmp_path / "adapter"
    export(sft_by_two.out, out, base=other)
    assert contract.read_probes(out) is None
    assert json.loads((out / contract.MANIFEST).read_text())["effect"] is None
