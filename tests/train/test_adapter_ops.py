"""diff, compose and prune say and make what the multiplied-out changes to the weights say they should."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file

from mixfuse.cli.entry import main
from mixfuse.contracts import adapter as contract
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.diff import diff
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.ops import compose, prune

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


def edit_manifest(directory: Path, out: Path, **keys: Any) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(directory, out)
    path = out / contract.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return out


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
    compose([(adapter_directory, 0.25), (adapter_directory, 0.75)], tmp_path / "twice", method="concat")
    total = diff(adapter_directory, tmp_path / "twice").to_json()["total"]
    assert total["cosine"] == pytest.approx(1, abs=1e-9)
    assert total["norm_of_difference"] <= 1e-6 * total["norm_a"]
    assert prune(tmp_path / "twice", tmp_path / "again", rank=4).share == pytest.approx(1, abs=1e-9)
    again, wanted = harness.deltas(tmp_path / "again"), harness.deltas(adapter_directory)
    assert size(summed((again, 1), (wanted, -1))) <= 1e-6 * size(wanted)


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


def test_concat_is_the_weighted_sum(
    adapter_directory: Path, others: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    parts = [(adapter_directory, 0.5), (others["wide"], -1.5), (others["attention"], 2.0)]
    composed = compose(parts, tmp_path / "out", method="concat")
    assert composed.manifest.rank == 4 + 8 + 2
    assert composed.relative_error < 1e-6
    changes = summed(*((harness.deltas(directory), weight) for directory, weight in parts))
    wanted = harness.logits_of_weights(tiny_base, changes)
    assert (wanted - harness.logits(tiny_base)).abs().max() > 0.1
    # Both layouts, in plain PEFT.
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out" / "peft"), wanted, rtol=0, atol=2e-4)
    manifest = contract.verify(tmp_path / "out", base=contract.fingerprint(tiny_base))
    parts_told = manifest.recipe["composed"]["parts"]
    assert [part["weight"] for part in parts_told] == [0.5, -1.5, 2.0]
    assert parts_told[0]["revision"] == contract.read_manifest(adapter_directory).revision


def test_a_sum_is_as_near_as_its_rank_allows(adapter_directory: Path, others: dict[str, Path], tmp_path: Path) -> None:
    parts = [(adapter_directory, 1.0), (others["wide"], 2.0)]
    composed = compose(parts, tmp_path / "out", method="sum", rank=6)
    assert composed.manifest.rank == 6
    wanted = summed(*((harness.deltas(directory), weight) for directory, weight in parts))
    got = harness.deltas(tmp_path / "out")
    assert composed.relative_error == pytest.approx(size(summed((got, 1), (wanted, -1))) / size(wanted), rel=1e-4)
    for name, change in wanted.items():
        if name.endswith((".w1.weight", ".w3.weight")):
            continue  # these share their A
        least = torch.linalg.svdvals(change)[6:].square().sum().sqrt()  # Eckart and Young
        assert float(torch.linalg.matrix_norm(got[name] - change)) == pytest.approx(float(least), rel=1e-4)
    assert compose(parts, tmp_path / "whole", method="sum", rank=12).relative_error < 1e-6


def test_pruning_keeps_the_largest_directions_and_says_how_much(
    others: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    pruned = prune(others["wide"], tmp_path / "out", rank=3)
    before, after = harness.deltas(others["wide"]), harness.deltas(tmp_path / "out")
    for energy in pruned.energies:
        layer, expert, projection = energy.place
        where = "self_attn" if expert is None else f"block_sparse_moe.experts.{expert}"
        names = [f"model.layers.{layer}.{where}.{one}.weight" for one in projection.split("+")]
        u, values, v = torch.linalg.svd(torch.cat([before[name] for name in names]), full_matrices=False)
        assert energy.share == pytest.approx(float(values[:3].square().sum() / values.square().sum()), rel=1e-5)
        nearest = (u[:, :3] * values[:3]) @ v[:3]
        torch.testing.assert_close(torch.cat([after[name] for name in names]), nearest, rtol=0, atol=1e-5)
    wanted = harness.logits_of_weights(tiny_base, after)
    for layout in (tmp_path / "out", tmp_path / "out" / "peft"):
        torch.testing.assert_close(harness.logits(tiny_base, layout), wanted, rtol=0, atol=1e-4)
    manifest = contract.verify(tmp_path / "out", base=contract.fingerprint(tiny_base))
    assert manifest.rank == 3
    assert manifest.metrics["energy_kept"] == pruned.share
    assert manifest.recipe["pruned"]["revision"] == contract.read_manifest(others["wide"]).revision
    # vLLM takes all of a layer's experts or none.
    assert len(load_file(tmp_path / "out" / contract.WEIGHTS)) == 2 * 2 * (4 + 3 * 4)


def test_experts_that_share_no_a_are_pruned_each_for_itself(tiny_base: Path, tmp_path: Path) -> None:
    from test_layouts import EVERY, per_expert

    export(per_expert(tmp_path / "old", tiny_base, EVERY), tmp_path / "old-served")
    pruned = prune(tmp_path / "old-served", tmp_path / "out", rank=2)
    assert {energy.place.projection for energy in pruned.energies} == {"w1", "w2", "w3"}
    assert not (tmp_path / "out" / "peft").exists()
    wanted = harness.logits_of_weights(tiny_base, harness.deltas(tmp_path / "out"))
    torch.testing.assert_close(harness.logits(tiny_base, tmp_path / "out"), wanted, rtol=0, atol=1e-4)


def test_judges_of_one_protocol_compose_to_a_judge(
    adapter_directory: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    data = [{"name": "pairs.jsonl", "sha256": "0" * 64, "rows": 8, "licence": "CC-BY-4.0"}]
    judge = edit_manifest(
        adapter_directory,
        tmp_path / "judge",
        role="judge",
        judge_protocol={"version": "2"},
        calibration={"temperature": 2.0},
        training_data=data,
    )
    made = compose([(judge, 1.0), (others["attention"], 1.0)], tmp_path / "made", method="concat").manifest
    assert (made.role, made.judge_protocol) == ("judge", {"version": "2"})
    assert [entry.licence for entry in made.training_data] == ["CC-BY-4.0"]
    assert made.calibration is None, "it was measured on other weights"
    domain = compose([(judge, 1), (others["wide"], 1)], tmp_path / "domain", method="concat", role="domain").manifest
    assert (domain.role, domain.judge_protocol) == ("domain", None)
    older = edit_manifest(others["wide"], tmp_path / "older", role="judge", judge_protocol={"version": "1"})
    with pytest.raises(MixfuseError, match="different judge protocols"):
        compose([(judge, 1.0), (older, 1.0)], tmp_path / "no", method="concat")
    with pytest.raises(MixfuseError, match="no judge"):
        compose([(adapter_directory, 1.0), (others["wide"], 1.0)], tmp_path / "no", method="concat", role="judge")


MISTAKES = {
    "one part": (["compose", "OUT", "A"], "takes two adapter directories or more"),
    "no weight": (["compose", "OUT", "A:heavy", "B"], "is not of the form DIR:WEIGHT"),
    "weight 0": (["compose", "OUT", "A:0", "B"], "must be a number other than 0"),
    "weight NaN": (["compose", "OUT", "A:nan", "B"], "must be a number other than 0"),
    "cancelled": (["compose", "OUT", "A", "A:-1"], "cancel each other out"),
    "rank of concat": (["compose", "OUT", "A", "B", "--rank", "4"], "--rank goes with --method sum"),
    "rank too large": (["compose", "OUT", "A", "B", "--method", "sum", "--rank", "13"], "use --method concat"),
    "rank 0": (["compose", "OUT", "A", "B", "--method", "sum", "--rank", "0"], "none that vLLM serves"),
    "no part": (["compose", "OUT", "A", "nowhere"], "nowhere: no such adapter directory"),
    "another base": (["compose", "OUT", "A", "OTHER"], "is of another base model"),
    "in the way": (["compose", "B", "A", "A"], "exists already"),
    "prune upwards": (["prune", "A", "OUT", "--rank", "4"], "choose a rank from 1 to 3"),
    "prune to nothing": (["prune", "A", "OUT", "--rank", "0"], "choose a rank from 1 to 3"),
    "prune nothing": (["prune", "nowhere", "OUT", "--rank", "1"], "no such adapter directory"),
    "no second": (["diff", "A", "nowhere"], "no such adapter directory"),
    "no manifest": (["diff", "A", "PEFT"], "has no manifest.json; make an adapter directory with"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    case: str,
    adapter_directory: Path,
    others: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = MISTAKES[case]
    places = {"OUT": tmp_path / "out", "A": adapter_directory, "B": others["wide"], "PEFT": adapter_directory / "peft"}
    if "OTHER" in arguments:
        base = json.loads((adapter_directory / contract.MANIFEST).read_text())["base"]
        places["OTHER"] = edit_manifest(others["wide"], tmp_path / "other", base=base | {"weights": "0" * 64})

    def placed(argument: str) -> str:
        name, colon, rest = argument.partition(":")
        return f"{places.get(name, name)}{colon}{rest}"

    assert main(["adapter", *map(placed, arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mixfuse: error: ")
    assert message in error
    assert not [path for path in tmp_path.iterdir() if path.name != "other"]


def test_a_directory_of_some_experts_only_is_to_be_exported_again(tiny_base: Path, tmp_path: Path) -> None:
    """The first version of mixfuse passed such adapters through, which vLLM refuses."""
    from test_layouts import per_expert

    source = per_expert(tmp_path / "old", tiny_base, ["1.0.w2", "1.2.w2"])
    export(source, tmp_path / "out")
    prune(tmp_path / "out", tmp_path / "pruned", rank=2)
    partial = {"experts_trained": True, "rank": 4, "base_path": str(tiny_base), "role": "domain"}
    files = {name: contract.file_hashes(source)[name] for name in (contract.CONFIG, contract.WEIGHTS)}
    base = contract.fingerprint(tiny_base)
    manifest = contract.Manifest(revision=contract.revision_of(files), files=files, base=base, **partial)
    (source / contract.MANIFEST).write_text(manifest.model_dump_json())
    with pytest.raises(MixfuseError, match=r"layer 1 has factors of some experts only.*mixfuse adapter export"):
        prune(source, tmp_path / "no", rank=2)
    assert export(source, tmp_path / "again").experts_trained
    assert prune(tmp_path / "again", tmp_path / "then", rank=2).share > 0


def test_a_rank_that_vllm_does_not_serve_is_refused(
    adapter_directory: Path, others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [(others["wide"], 1.0)] * 65
    with pytest.raises(MixfuseError, match=r"rank 520 is none that vLLM serves .*or prune the parts"):
        compose(parts, tmp_path / "out", method="concat")
