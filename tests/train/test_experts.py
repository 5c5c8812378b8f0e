"""Experts chosen by load: router outputs are counted, the fewest experts with the share are trained, ranks agree."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from safetensors.torch import load_file, save_file
from train_harness import Run

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.adapters.export import export
from mixfuse.train.model import choose_experts
from mixfuse.train.model.choose_experts import Load
from mixfuse.train.model.load import load_base
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.processes.checkpoint import last_checkpoint
from mixfuse.train.recipe import JudgeRecipe, Lora, SftRecipe, kind_of, lora_parameters

# Layer 0 sends every token to experts 2 and 0, about 3 to 1; layer 1 to 3, and hardly to 1.
PULL = {0: {2: 0.30, 0: 0.15}, 1: {3: 1.0, 1: 0.2}}


@pytest.fixture(scope="module")
def skewed_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with routers that have favourites: the first hidden feature is great for every token."""
    base = tmp_path_factory.mktemp("skewed") / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 30.0
    for layer, pulls in PULL.items():
        router = torch.zeros_like(tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
        for expert, pull in pulls.items():
            router[expert, 0] = pull
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="module")
def recipe_path(skewed_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = {"r": 4, "alpha": 16, "experts": "auto", "expert_share": 0.9, "expert_sample": 7, "dropout": 0.05}
    return harness.sft_recipe(tmp_path_factory.mktemp("auto"), skewed_base, lora=lora)


@pytest.fixture(scope="module")
def model(skewed_base: Path) -> Any:
    return load_base(skewed_base, torch.float32)


def rows(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(5, 40000, (length,), generator=random).tolist() for length in lengths]


def test_the_fewest_experts_that_carry_the_share() -> None:
    load_ = Load(1, ((0.1, 0.4, 0.2, 0.3), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 1.0, 0.0)), ((0.0,),) * 3)
    assert choose_experts.choose(load_, 0.7) == ((1, 3), (0, 1, 2), (2,))
    assert choose_experts.choose(load_, 0.71) == ((1, 2, 3), (0, 1, 2), (2,))
    assert choose_experts.choose(load_, 1.0) == ((0, 1, 2, 3), (0, 1, 2, 3), (2,))
    assert choose_experts.choose(load_, 0.01) == ((1,), (0,), (2,))


def test_a_skewed_router_is_heard(model: Any) -> None:
    measured = choose_experts.measure(model, rows(9, 30, 4, 17, 12), micro_batch=2)
    assert measured.tokens == 72
    for layer, (gates, tokens) in enumerate(zip(measured.gate_share, measured.token_share, strict=True)):
        assert sum(gates) == pytest.approx(1)
        assert sum(tokens) == pytest.approx(2)
        for expert in PULL[layer]:
            assert tokens[expert] > 0.9
    assert 0.6 < measured.gate_share[0][2] < 0.9
    assert measured.gate_share[1][3] > 0.95
    assert choose_experts.choose(measured, 0.9) == ((0, 2), (3,))
    assert choose_experts.choose(measured, 0.5) == ((2,), (3,))


def test_padding_and_batching_do_not_count(model: Any) -> None:
    several = choose_experts.measure(model, rows(9, 30, 4, 17, 12), micro_batch=4)
    single = choose_experts.measure(model, rows(9, 30, 4, 17, 12), micro_batch=1)
    assert several.tokens == single.tokens
    for name in ("gate_share", "token_share"):
        assert torch.allclose(torch.tensor(getattr(several, name)), torch.tensor(getattr(single, name)), atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_count_is_what_the_router_weights_say(model: Any) -> None:
    """By hand, from the router's own output for one row."""
    (row,) = rows(20)
    seen: list[Any] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(torch.tensor([row]))
    handle.remove()
    _, weights, index = seen[0]
    by_hand = [float(weights[index == expert].sum()) / 20 for expert in range(4)]
    assert choose_experts.measure(model, [row], micro_batch=3).gate_share[0] == pytest.approx(by_hand, abs=1e-5)


def test_the_choice_is_written_down_and_a_resumed_run_reads_it(
    model: Any, recipe_path: Path, skewed_base: Path, tmp_path: Path
) -> None:
    recipe = load(recipe_path, SftRecipe, [f"out={tmp_path / 'run'}"])
    tokenizer = load_tokenizer(skewed_base)
    data = [{"input_ids": row} for row in rows(*range(5, 15))]
    chosen = choose_experts.choose_for_run(recipe, model, data, tokenizer, resuming=False)
    record = json.loads((recipe.out / "experts.json").read_text())
    assert chosen == ((0, 2), (3,)) == tuple(map(tuple, record["chosen"]))
    assert record["trainable_parameters"] < record["trainable_parameters_all_experts"]
    assert record["tokens"] == sum(map(len, choose_experts.sample(data, tokenizer, recipe)))
    record["chosen"] = [[1], [0, 1]]
    (recipe.out / "experts.json").write_text(json.dumps(record))
    assert choose_experts.choose_for_run(recipe, model, data, tokenizer, resuming=True) == ((1,), (0, 1))
    (recipe.out / "experts.json").unlink()
    with pytest.raises(MixfuseError, match=r"not its experts\.json"):
        choose_experts.choose_for_run(recipe, model, data, tokenizer, resuming=True)


def test_a_sample_is_drawn_with_the_seed_and_cut(recipe_path: Path, skewed_base: Path) -> None:
    recipe, tokenizer = load(recipe_path, SftRecipe, ["max_length=6"]), load_tokenizer(skewed_base)
    data = [{"input_ids": row} for row in rows(*range(3, 33))]
    drawn = choose_experts.sample(data, tokenizer, recipe)
    assert len(drawn) == 7
    assert max(map(len, drawn)) == 6
    assert drawn == choose_experts.sample(data, tokenizer, recipe)
    assert drawn != choose_experts.sample(data, tokenizer, load(recipe_path, SftRecipe, ["max_length=6", "seed=1"]))
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    assert choose_experts.sample([pair], tokenizer, load(recipe_path, SftRecipe, [])) == [[1, 2, 3]]


def test_parameters_are_counted_without_a_model(model: Any) -> None:
    from peft import get_peft_model

    from mixfuse.train.model.load import lora_config

    lora = Lora(r=4, experts={0: (1, 3), 1: (2,)})
    counted = lora_parameters(model.config.to_dict(), lora)
    wrapped = get_peft_model(load_base(Path(model.config._name_or_path), torch.float32), lora_config(MIXTRAL, lora))
    for layer, (attention, adapted) in enumerate(counted):
        sizes = {name: p.numel() for name, p in wrapped.named_parameters() if f".layers.{layer}." in name}
        assert attention == sum(size for name, size in sizes.items() if "self_attn" in name and "lora_" in name)
        assert adapted == sum(size for name, size in sizes.items() if "experts" in name and "lora_" in name)
    assert sum(map(sum, lora_parameters(model.config.to_dict(), Lora(r=4)))) > sum(map(sum, counted))


@pytest.mark.parametrize("kind", ["sft", "judge"])
def test_the_profile_command(kind: str, recipe_path: Path, judge_recipe: Path, tmp_path: Path) -> None:
    path = recipe_path if kind == "sft" else judge_recipe
    done = harness.mixfuse("experts", "profile", path, "lora.expert_share=0.6", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "out" / "experts.json").read_text())
    assert (tmp_path / "out" / "experts.png").read_bytes().startswith(b"\x89PNG")
    if kind == "sft":
        assert record["chosen"] == [[2], [3]]
        assert " 4 of 8 " not in done.stdout
        assert "2 of 8 experts have the gate weight" in done.stdout
        assert "almost even" not in done.stdout
    else:
        assert "almost even" in done.stdout  # the tiny base's random routers
    assert done.stdout.count("*") >= sum(map(len, record["chosen"]))


def test_a_bad_recipe_is_one_line(recipe_path: Path) -> None:
    done = harness.mixfuse("experts", "profile", recipe_path, "lora.expert_sharing=0.6")
    assert done.returncode == 2
    assert "unknown key 'lora.expert_sharing'; did you mean 'lora.expert_share'?" in done.stderr
    assert kind_of(recipe_path, ["beta=1"]) is JudgeRecipe


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of the layer without experts: PEFT's start, nothing
def test_an_adapter_of_some_experts_means_the_same_everywhere(tiny_base: Path, tmp_path: Path) -> None:
    """In training, as the run saves it, exported per expert, and exported fused: with rsLoRA and after dropout."""
    from peft import get_peft_model

    from mixfuse.train.adapters.saving import save_peft
    from mixfuse.train.model.load import lora_config

    lora = Lora(r=4, alpha=8, rslora=True, dropout=0.1, experts={1: (0, 2)})
    wrapped: Any = get_peft_model(load_base(tiny_base, torch.float32), lora_config(MIXTRAL, lora)).eval()
    random, weights = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
                weights[name.replace(".default.", ".")] = parameter.detach().clone()
        trained = wrapped(torch.tensor([harness.PROBE])).logits
    saved, out = tmp_path / "saved", tmp_path / "exported"
    saved.mkdir()
    save_peft(wrapped, weights, saved)
    export(saved, out, base=tiny_base)
    assert (trained - harness.logits(tiny_base)).abs().max() > 0.1
    for folder in (saved, out / "peft", out):
        torch.testing.assert_close(harness.logits(tiny_base, folder), trained, rtol=0, atol=1e-4)
    tensors = load_file(out / contract.WEIGHTS)
    assert {name.split(".layers.")[1][0] for name in tensors if ".experts." in name} == {"1"}
    b = "base_model.model.model.layers.1.block_sparse_moe.experts.{}.w2.lora_B.weight"
    assert [bool(tensors[b.format(expert)].any()) for expert in range(4)] == [True, False, True, False]


@pytest.fixture(scope="module")
def interrupted(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ZeRO-3 processes choose, train, are killed after a checkpoint, and are started again."""
    folder = tmp_path_factory.mktemp("interrupted")
    overrides = ["processes=2", f"out={folder / 'run'}", "save_every=2", "gradient_checkpointing=true"]
    command = [sys.executable, "-m", "mixfuse", "train", "sft", str(recipe_path), *overrides]
    with (folder / "log").open("w") as log:
        parent = subprocess.Popen(command, env=harness.ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 250
        while last_checkpoint(folder / "run") is None and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.send_signal(signal.SIGTERM)
        parent.wait(timeout=60)
    assert last_checkpoint(folder / "run") is not None, (folder / "log").read_text()[-4000:]
    # What the routers say of another sample must not matter any more.
    before = (folder / "run" / "experts.json").read_text()
    run = harness.train("sft", recipe_path, *overrides)
    assert (folder / "run" / "experts.json").read_text() == before
    return run


@pytest.mark.zero3
def test_two_processes_choose_the_same_train_resume_and_save_plain_peft(
    interrupted: Run, skewed_base: Path, tmp_path: Path
) -> None:
    record = json.loads((interrupted.out / "experts.json").read_text())
    assert record["chosen"] == [[0, 2], [3]]
    assert interrupted.record["metrics"]["trainable_parameters"] == record["trainable_parameters"]
    assert [row["step"] for row in interrupted.steps] == list(range(1, harness.SFT_STEPS + 1))
    assert interrupted.series("loss")[-1] < interrupted.series("loss")[0]
    weights = interrupted.weights()
    for layer, chosen in enumerate(record["chosen"]):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for wrapper in (f"{stem}.base_layer", stem):
            a = weights[f"{wrapper}.lora_A.weight"].unflatten(0, (4, 4))
            b = weights[f"{wrapper}.lora_B.weight"].unflatten(1, (4, 4))
            for expert in range(4):
                assert bool(a[expert].any()) == (expert in chosen), (wrapper, expert)
                assert bool(b[..., expert].any()) == (expert in chosen), (wrapper, expert)
    plain, adapted = (harness.logits(skewed_base, path) for path in (None, interrupted.out / "adapter"))
    assert (adapted - plain).abs().max() > 0.1
    manifest = export(interrupted.out, tmp_path / "exported")
    assert manifest.experts_trained
    assert contract.verify(tmp_path / "exported", base=contract.fingerprint(skewed_base)) == manifest
    torch.testing.assert_close(harness.logits(skewed_base, tmp_path / "exported" / "peft"), adapted, rtol=0, atol=1e-5)
