"""`mixfuse adapter diff` gives the figures of the multiplied-out changes to the weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file, save_file

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter as contract
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.diff import diff
from mixfuse.train.adapters.export import export

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@pytest.fixture(scope="module")
def others(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter directories beside `adapter_directory`: "wide" has another rank and scale, "attention" no experts."""
    root = tmp_path_factory.mktemp("others")
    made = {}
    for name, r, experts in (("wide", 8, True), ("attention", 2, False)):
        source = harness.save_adapter(tiny_base, root / f"{name}-peft", attention=True, experts=experts, r=r, std=0.03)
        export(source, root / name, base=tiny_base)
        made[name] = root / name
    return made


def summed(*parts: tuple[dict[str, Any], float]) -> dict[str, Any]:
    names = {name: None for changes, _ in parts for name in changes}
    return {name: sum(weight * changes[name] for changes, weight in parts if name in changes) for name in names}


def size(changes: dict[str, Any]) -> float:
    return math.hypot(*(float(torch.linalg.matrix_norm(change)) for change in changes.values()))


def test_a_difference_is_that_of_the_multiplied_out_changes(
    adapter_directory: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    found = diff(adapter_directory, others["wide"])
    one, other = harness.deltas(adapter_directory), harness.deltas(others["wide"])
    assert len(found.modules) == len(one) == 2 * (4 + 3 * 4)
    for module in found.modules:
        layer, expert, projection = module.place
        where = "self_attn" if expert is None else f"block_sparse_moe.experts.{expert}"
        a, b = (changes[f"model.layers.{layer}.{where}.{projection}.weight"] for changes in (one, other))
        assert module.norm_a == pytest.approx(float(torch.linalg.matrix_norm(a)), rel=1e-6)
        assert module.norm_b == pytest.approx(float(torch.linalg.matrix_norm(b)), rel=1e-6)
        assert module.inner == pytest.approx(float((a * b).sum()), rel=1e-4, abs=1e-9)
    told = found.to_json()
    assert told["total"]["norm_of_difference"] == pytest.approx(size(summed((one, 1), (other, -1))), rel=1e-6)
    assert told["same_base"] is True
    assert (told["a"]["rank"], told["b"]["rank"], told["a"]["scale"]) == (4, 8, 4.0)
    expert = found.grouped()[1]["3"]
    members = [one[f"model.layers.1.block_sparse_moe.experts.3.{w}.weight"] for w in ("w1", "w2", "w3")]
    assert expert.norm_a == pytest.approx(size(dict(enumerate(members))), rel=1e-6)  # type: ignore[arg-type]


def test_the_same_adapter_in_another_guise_does_not_differ(adapter_directory: Path, tmp_path: Path) -> None:
    """Twice the rank: a quarter of each change beside three quarters of it."""
    factors = load_file(adapter_directory / contract.WEIGHTS)
    twice = {
        name: torch.cat([factor, factor]) if ".lora_A." in name else torch.cat([0.25 * factor, 0.75 * factor], dim=1)
        for name, factor in factors.items()
    }
    config = json.loads((adapter_directory / contract.CONFIG).read_text())
    (tmp_path / "twice").mkdir()
    save_file(twice, tmp_path / "twice" / contract.WEIGHTS)
    doubled = config | {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    (tmp_path / "twice" / contract.CONFIG).write_text(json.dumps(doubled))
    assert export(tmp_path / "twice", tmp_path / "exported").rank == 8
    total = diff(adapter_directory, tmp_path / "exported").to_json()["total"]
    assert total["cosine"] == pytest.approx(1, abs=1e-9)
    assert total["norm_of_difference"] <= 1e-6 * total["norm_a"]


def test_the_command_prints_a_table_a_plot_and_json(
    adapter_directory: Path, others: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    plot = tmp_path / "heat.png"
    assert main(["adapter", "diff", *map(str, (adapter_directory, others["attention"], "--plot", plot, "--json"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    experts = [module for module in told["modules"] if module["expert"] is not None]
    assert len(experts) == 2 * 4 * 3
    assert all(module["norm_b"] == 0 and module["cosine"] is None for module in experts)
    table = "\n".join(lines)
    for word in (told["a"]["revision"], "k_proj o_proj q_proj v_proj w1 w2 w3", "attention", "‖A - B‖"):
        assert word in table
    assert imread(plot).std() > 0.05, "the plot is blank"


MISTAKES = {
    "no second": (["diff", "A", "nowhere"], "no such adapter directory"),
    "no manifest": (["diff", "A", "PEFT"], "has no manifest.json; make an adapter directory with"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, adapter_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[case]
    places = {"A": adapter_directory, "PEFT": adapter_directory / "peft"}
    assert main(["adapter", *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mixfuse: error: ")
    assert message in error


def test_a_directory_of_some_experts_only_is_to_be_exported_again(tiny_base: Path, tmp_path: Path) -> None:
    """The first version of mixfuse passed such adapters through, which vLLM refuses."""
    from test_layouts import per_expert

    source = per_expert(tmp_path / "old", tiny_base, ["1.0.w2", "1.2.w2"])
    partial = {"experts_trained": True, "rank": 4, "base_path": str(tiny_base), "role": "domain"}
    files = {name: contract.file_hashes(source)[name] for name in (contract.CONFIG, contract.WEIGHTS)}
    base = contract.fingerprint(tiny_base)
    manifest = contract.Manifest(revision=contract.revision_of(files), files=files, base=base, **partial)
    (source / contract.MANIFEST).write_text(manifest.model_dump_json())
    with pytest.raises(MixfuseError, match=r"layer 1 has factors of some experts only.*mixfuse adapter export"):
        diff(source, source)
    assert export(source, tmp_path / "again").experts_trained
    assert diff(tmp_path / "again", tmp_path / "again").to_json()["total"]["cosine"] == pytest.approx(1)
