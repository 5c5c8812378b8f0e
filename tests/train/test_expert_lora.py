"""Expert LoRA in activation space does what PEFT's `target_parameters` does, for less.

Run as a script it is a rank of the ZeRO-3 test; with the one argument `golden` it writes PEFT's loss curve anew.
"""

import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.model import expert_lora, expert_products

Chosen = dict[int, tuple[int, ...]]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = (GATE_UP, DOWN)
CHOSEN = {0: (1, 3), 1: (0,)}
STEPS, LEARNING_RATE = 10, 1e-2
GOLDEN = Path(__file__).parents[1] / "assets" / "losses" / "expert_lora_peft.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("expert-lora") / "base")


def save_base(path: Path) -> Path:
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.15,  # so that experts and adapters have something to say
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(path)
    return path


def load(base: Path, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    expert_lora.register()
    model = MixtralForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation=implementation)
    model.config.use_cache = False
    return model


def lora_config(
    *, ours: bool, parameters: tuple[str, ...] = BOTH, r: int = 4, chosen: Chosen | None = None, **keys: Any
) -> LoraConfig:
    if chosen is not None:
        parameters = tuple(f"layers.{layer}.{parameter}" for layer in chosen for parameter in parameters)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"], target_parameters=list(parameters), **keys)
    if ours:
        expert_lora.attach(config, chosen)
    return config


def fill(model: Any, seed: int, adapter: str = "default") -> None:
    """Random factors, the same for the same names: a fresh B is zero and would hide what is wrong."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)


def adapted(base: Path, *, ours: bool, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    implementation = expert_lora.EXPERTS_IMPLEMENTATION if ours else "grouped_mm"
    model = get_peft_model(load(base, implementation, dtype), lora_config(ours=ours, **keys))
    fill(model, seed=1)
    return model.train()


def tokens(rows: int = 2, length: int = 16, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_same(ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    logits, grads = gradients(ours, ids)
    expected, expected_grads = gradients(theirs, ids)
    assert relative(logits, expected) < 1e-4
    assert grads.keys() == expected_grads.keys()
    assert all("lora_" in name for name in grads)
    assert {name: relative(grads[name], value) for name, value in expected_grads.items() if value.any()} == (
        pytest.approx(dict.fromkeys((name for name, value in expected_grads.items() if value.any()), 0), abs=1e-4)
    )


@pytest.mark.parametrize("parameters", [BOTH, (GATE_UP,), (DOWN,)], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_logits_and_gradients_are_pefts(base: Path, parameters: tuple[str, ...], checkpointing: str) -> None:
    ours, theirs = adapted(base, ours=True, parameters=parameters), adapted(base, ours=False, parameters=parameters)
    expert_lora.assert_in_force(ours)
    if checkpointing != "none":
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    assert_same(ours, theirs, tokens())


def test_experts_without_tokens(base: Path) -> None:
    """One token reaches two of four experts a layer; the others' gradients are zero, not missing."""
    ours, theirs = adapted(base, ours=True), adapted(base, ours=False)
    ids = tokens(rows=1, length=2)
    assert_same(ours, theirs, ids)


def test_one_grouped_product_equals_the_loop(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, with the same calls on the CPU."""
    ours, theirs = adapted(base, ours=True), adapted(base, ours=False)
    monkeypatch.setattr(expert_products, "_has_grouped_product", lambda *_: True)
    assert_same(ours, theirs, tokens())


def test_a_disabled_adapter_is_the_base(base: Path) -> None:
    """DPO's reference."""
    ours, ids = adapted(base, ours=True), tokens()
    plain = load(base, expert_lora.EXPERTS_IMPLEMENTATION)
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert relative(ours(ids).logits, plain(ids).logits) > 0.01
    assert relative(plain(ids).logits, load(base, "eager")(ids).logits) < 1e-5


def test_training_follows_pefts_loss_curve(base: Path) -> None:
    """50 seeded steps; the file holds PEFT's own: `python tests/train/test_expert_lora.py golden` writes it anew."""
    golden = json.loads(GOLDEN.read_text())
    curve = curve_of(adapted(base, ours=True), steps=len(golden["losses"]))
    assert len(curve) == 50
    assert curve == pytest.approx(golden["losses"], abs=1e-3)
    assert curve[-1] < curve[0] - 1
    # And the file is PEFT's still.
    assert curve_of(adapted(base, ours=False)) == pytest.approx(golden["losses"][:STEPS], abs=1e-3)


def test_rslora(base: Path) -> None:
    ours, theirs = (adapted(base, ours=is_ours, use_rslora=True) for is_ours in (True, False))
    assert_same(ours, theirs, tokens())
    assert relative(ours(tokens()).logits, adapted(base, ours=True)(tokens()).logits) > 1e-3


def test_gradients_accumulate_as_pefts_do(base: Path) -> None:
    sums = []
    for is_ours in (True, False):
        model = adapted(base, ours=is_ours)
        for seed in (1, 2):
            model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        sums.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert sums[0].keys() == sums[1].keys()
    for name, value in sums[1].items():
        assert relative(sums[0][name], value) < 1e-4, name


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("chosen", [CHOSEN, {1: (2,)}], ids=["some", "one layer"])
def test_untouched_experts(base: Path, chosen: Chosen, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT with zeros for their factors; and nothing is allocated or trained for them."""
    monkeypatch.setattr(expert_products, "_has_grouped_product", lambda *_: grouped)
    ours = adapted(base, ours=True, chosen=chosen)
    expert_lora.assert_in_force(ours)
    theirs = get_peft_model(load(base, "grouped_mm"), lora_config(ours=False))
    factors = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    plain = expert_lora.as_plain_peft(ours, {name.replace(".default", ""): p.detach() for name, p in factors.items()})
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(plain.get(name.replace(".default", ""), torch.zeros(())))
    ids = tokens()
    logits, grads = gradients(ours.train(), ids)
    expected, expected_grads = gradients(theirs.train(), ids)
    assert relative(logits, expected) < 1e-4
    for name, grad in grads.items():
        layer = next((number for number in chosen if f".layers.{number}.mlp." in name), None)
        theirs_grad = expected_grads[name]
        if layer is not None:
            index = list(chosen[layer])
            if ".lora_A." in name:
                theirs_grad = theirs_grad.view(4, 4, -1)[index].flatten(0, 1)
            else:
                theirs_grad = theirs_grad.view(len(theirs_grad), 4, 4)[..., index].flatten(1)
        assert relative(grad, theirs_grad) < 1e-4, name
    adapted_experts = sum(p.numel() for name, p in factors.items() if ".experts." in name)
    assert adapted_experts == sum(map(len, chosen.values())) * 4 * ((32 + 96) + (48 + 32))
    shapes = {p.shape for name, p in factors.items() if ".layers.1.mlp.experts.lora_A" in name}
    assert shapes == {(4, 48)}


def test_untouched_experts_are_merged_disabled_and_told_apart(base: Path) -> None:
    ours, ids = adapted(base, ours=True, chosen=CHOSEN).eval(), tokens()
    plain = load(base, expert_lora.EXPERTS_IMPLEMENTATION)
    with torch.no_grad():
        expected = ours(ids).logits
        with ours.disable_adapter():
            assert torch.equal(ours(ids).logits, plain(ids).logits)
        assert relative(expected, plain(ids).logits) > 0.01
        merged = ours.merge_and_unload()
        assert relative(merged(ids).logits, expected) < 1e-4
    weight, before = (model.model.layers[1].mlp.experts.down_proj for model in (merged, plain))
    assert [not torch.equal(weight[expert], before[expert]) for expert in range(4)] == [True, False, False, False]


def small_problem(dropout: float, dtype: torch.dtype) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A function of input, gate weights, A, B, A, B, and these; some experts are untouched, one has no rows."""
    config = MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=4, num_experts_per_tok=2)
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    experts = MixtralExperts(config).to(dtype).requires_grad_(requires_grad=False)
    for weight in experts.parameters():
        weight.copy_(draw(*weight.shape))
    index = torch.tensor([[0, 1], [3, 0], [1, 0], [3, 1], [0, 3]])  # expert 2 has no rows
    inputs = [draw(5, 8), draw(5, 2), draw(3 * 2, 8), draw(8, 2 * 3), draw(2 * 2, 4), draw(8, 2 * 2)]

    def run(x: torch.Tensor, gates: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        lora = {
            "gate_up_proj": expert_products.Factors(factors[0], factors[1], 0.5, (0, 2, 3), dropout),
            "down_proj": expert_products.Factors(factors[2], factors[3], 0.7, (0, 1), dropout),
        }
        return expert_lora.experts_forward(experts, x, index, gates, lora)

    return run, [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_gradient_is_the_derivative(dropout: float) -> None:
    """Numerically, in float64; with dropout, of one and the same mask."""
    run, inputs = small_problem(dropout, torch.float64)
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(run, inputs)


def test_one_grouped_product_equals_the_loop_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under masks that depend on the input alone: by nature the two draw them in other portions."""
    monkeypatch.setattr(expert_products._Lora, "mask", lambda _, x: (x.detach() > 0).to(x.dtype) * 2)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(expert_products, "_has_grouped_product", lambda *_, grouped=grouped: grouped)
        run, inputs = small_problem(0.5, torch.float32)
        output = run(*inputs)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    for loop, group in zip(*results, strict=True):
        assert relative(group, loop) < 1e-5


def test_dropout_is_on_the_adapters_input_alone(base: Path) -> None:
    """None at rest and none of the base; in training a fresh mask each time, and the mean over masks is no dropout."""
    ours, ids = adapted(base, ours=True, lora_dropout=0.5), tokens()
    layer = ours.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        rest, plain = adapted(base, ours=True).eval()(ids).logits, load(base, expert_lora.EXPERTS_IMPLEMENTATION)
        assert torch.equal(ours.eval()(ids).logits, rest)
        ours.train()
        assert not torch.equal(layer(x), layer(x))
        with ours.disable_adapter():
            assert torch.equal(layer(x), plain.model.layers[0].mlp(x))
        ours.eval()
        still = layer(x)
        ours.train()
        # Gate and up enter through a non-linearity: only down's dropout leaves the mean where it was.
        layer.experts.base_layer.lora_dropout["default"].p = 0.0
        runs = torch.stack([layer(x) for _ in range(400)])
        error = runs.std(0) / 400**0.5
        assert ((runs.mean(0) - still).abs() < 5 * error + 1e-6).all()
        assert error.mean() > 1e-4


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_draws_the_same_masks_again(base: Path, reentrant: bool) -> None:
    ours, ids = adapted(base, ours=True, lora_dropout=0.3), tokens()
    ours.enable_input_require_grads()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        _, expected = gradients(ours, ids)
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        _, grads = gradients(ours, ids)
        _, others = gradients(ours, ids)
    for name, value in expected.items():
        assert relative(grads[name], value) < 1e-5, name
    assert any(relative(others[name], value) > 0.01 for name, value in expected.items())


def test_the_saved_adapter_is_plain_peft(base: Path, tmp_path: Path) -> None:
    ours, ids = adapted(base, ours=True).eval(), tokens()
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = ours(ids).logits
        loaded = PeftModel.from_pretrained(load(base, "eager"), tmp_path).eval()
        assert relative(loaded(ids).logits, expected) < 1e-4
        again = PeftModel.from_pretrained(
            load(base, expert_lora.EXPERTS_IMPLEMENTATION), tmp_path, config=reread(tmp_path)
        )
        expert_lora.assert_in_force(again)
        assert torch.equal(again.eval()(ids).logits, expected)
        assert relative(ours.merge_and_unload()(ids).logits, expected) < 1e-4


def reread(adapter: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(adapter)
    expert_lora.attach(config)
    return config


def test_one_of_several_adapters(base: Path) -> None:
    ours, theirs, ids = adapted(base, ours=True).eval(), adapted(base, ours=False).eval(), tokens()
    for model, is_ours in ((ours, True), (theirs, False)):
        model.add_adapter("second", lora_config(ours=is_ours, r=2))
        fill(model, seed=5, adapter="second")
    logits = []
    for name in ("second", "default"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        logits.append(ours(ids).logits)
        assert relative(logits[-1], theirs(ids).logits) < 1e-4
    assert relative(logits[0], logits[1]) > 0.01
    ours.base_model.set_adapter(["default", "second"])
    with pytest.raises(MixfuseError, match="supports one active adapter"):
        ours(ids)


def test_bfloat16(base: Path) -> None:
    """On a bfloat16 base PEFT keeps the factors in float32; so do their gradients."""
    ours, theirs = adapted(base, ours=True, dtype=torch.bfloat16), adapted(base, ours=False, dtype=torch.bfloat16)
    logits, grads = gradients(ours, tokens())
    expected, expected_grads = gradients(theirs, tokens())
    assert logits.dtype == torch.bfloat16
    assert relative(logits.float(), expected.float()) < 0.03
    for name, value in expected_grads.items():
        assert grads[name].dtype == torch.float32
        assert relative(grads[name], value) < 0.1, name


def test_backward_does_no_work_for_frozen_weights(base: Path) -> None:
    """Backward of a frozen linear costs as much as its forward; with a weight gradient it would cost twice that."""
    ours = adapted(base, ours=True)
    experts = ours.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = experts(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    linears = 2 * (64 * 2) * (32 * 96 + 48 * 32)  # both projections, two experts a token
    assert linears < forward.get_total_flops() < 1.3 * linears
    assert linears < backward.get_total_flops() < 1.5 * linears


def test_less_is_saved_for_backward_than_by_peft(base: Path) -> None:
    def saved(model: Any) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=tokens(), labels=tokens())
        del output
        return sum(sizes.values())

    attention = LoraConfig(r=4, target_modules=["q_proj"])
    without = saved(get_peft_model(load(base, "grouped_mm"), attention))
    ours, theirs = saved(adapted(base, ours=True)), saved(adapted(base, ours=False))
    assert ours - without < 0.3 * (theirs - without)


def test_pefts_slow_path_never_runs_in_silence(base: Path) -> None:
    slow = get_peft_model(load(base, expert_lora.EXPERTS_IMPLEMENTATION), lora_config(ours=False))
    with pytest.raises(MixfuseError, match="PEFT's own wrapper"):
        expert_lora.assert_in_force(slow)
    with pytest.raises(MixfuseError, match="PEFT's own wrapper"):
        slow(tokens())
    other = adapted(base, ours=True)
    other.get_base_model().set_experts_implementation("grouped_mm")
    with pytest.raises(MixfuseError, match="'grouped_mm'"):
        expert_lora.assert_in_force(other)
    with pytest.raises(TypeError, match="lora"):
        other(tokens())
    with pytest.raises(MixfuseError, match="no experts of a known family"):
        expert_lora.assert_in_force(torch.nn.Linear(2, 2))


def test_an_unregistered_implementation_is_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = adapted(base, ours=True)
    monkeypatch.setitem(expert_lora.ALL_EXPERTS_FUNCTIONS._global_mapping, expert_lora.EXPERTS_IMPLEMENTATION, None)
    with pytest.raises(MixfuseError, match="not registered"):
        expert_lora.assert_in_force(ours)


def test_trainable_experts_are_refused(base: Path) -> None:
    ours = adapted(base, ours=True)
    ours.get_base_model().model.layers[0].mlp.experts.get_base_layer().down_proj.requires_grad_()
    with pytest.raises(MixfuseError, match="frozen"):
        ours(tokens())


@pytest.mark.zero3
@pytest.mark.slow
def test_two_zero3_processes_equal_one(base: Path, tmp_path: Path) -> None:
    """And between forward and backward no gathered expert weight is kept, with and without checkpointing."""
    expected = {
        name: curve_of(adapted(base, ours=True, chosen=CHOSEN if name == "chosen" else None))
        for name in ("all", "chosen")
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, __file__, str(base), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, result in json.loads((tmp_path / "result.json").read_text()).items():
        assert result["losses"] == pytest.approx(expected["chosen" if name == "reentrant" else "all"], abs=1e-3), name
        assert result["gathered"] > 0, name
        assert result["kept"] == 0, name


def curve_of(model: Any, *, steps: int = STEPS) -> list[float]:
    """Losses of a plain loop on one process."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        ids = tokens(rows=4, seed=step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def rank_main(base: Path, out: Path) -> None:
    """One ZeRO-3 rank: the same loop on its share of the rows, then the same with both kinds of checkpointing.

    The reentrant one adapts some experts only.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    results = {name: zero3_curve(base, name) for name in ("none", "not reentrant", "reentrant")}
    if torch.distributed.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(results))


def zero3_curve(base: Path, checkpointing: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.runtime.zero import GatheredParameters
    from torch.multiprocessing.reductions import StorageWeakRef
    from transformers.integrations import HfDeepSpeedConfig

    from mixfuse.train.model.load import load_base

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 4 // world,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            # A parameter is released as soon as its block is through; by default ZeRO-3 keeps a billion elements.
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    alive = HfDeepSpeedConfig(copy.deepcopy(config))
    expert_lora.register()
    model: Any = load_base(base, torch.float32)
    model.set_experts_implementation(expert_lora.EXPERTS_IMPLEMENTATION)
    model.config.use_cache = False
    chosen = CHOSEN if checkpointing == "reentrant" else None
    model = get_peft_model(model, lora_config(ours=True, chosen=chosen)).train()
    expert_lora.assert_in_force(model)
    random = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if ".default." in name:
            with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")), torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    if checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    gathered: list[StorageWeakRef] = []
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            module.register_forward_pre_hook(
                lambda module, _: gathered.extend(
                    StorageWeakRef(weight.untyped_storage()) for weight in (module.gate_up_proj, module.down_proj)
                )
            )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses, kept = [], 0
    for step in range(STEPS):
        ids = tokens(rows=4, seed=step % 2).chunk(world)[rank]
        gathered.clear()
        loss = engine(input_ids=ids, labels=ids).loss
        kept += sum(not storage.expired() for storage in gathered)
        seen = len(gathered)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    del alive
    engine.destroy()
    return {"losses": losses, "kept": kept, "gathered": seen}


def golden_main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = curve_of(adapted(save_base(Path(folder) / "base"), ours=False), steps=50)
    what = "PEFT's target_parameters on the tiny base of tests/train/test_expert_lora.py: r 4, AdamW, lr 1e-2, float32"
    GOLDEN.write_text(json.dumps({"what": what, "losses": [round(loss, 6) for loss in losses]}, indent=1) + "\n")


if __name__ == "__main__":
    golden_main() if sys.argv[1:] == ["golden"] else rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
