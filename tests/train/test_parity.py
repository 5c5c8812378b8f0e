"""The parity gate: passes an engine that applies the adapter, and names what an engine that does not has dropped.

The engine's part is played by a second computation with transformers and PEFT, on the per-expert files; the gate
against a real vLLM is in tests/serve.
"""

import asyncio
import gc
import json
import platform
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from mixfuse.contracts import adapter as contract
from mixfuse.contracts import signing
from mixfuse.contracts.adapter import PARITY_TOLERANCE, Parity
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters import layerwise, parity
from mixfuse.train.adapters.export import export
from mixfuse.train.adapters.layerwise import streams
from mixfuse.train.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")


@dataclass(frozen=True)
class Engine:
    """Log-probabilities as an engine would send them."""

    model: Any

    async def __call__(self, prompt: list[int]) -> list[float]:
        with torch.no_grad():
            scores = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        return [float(scores[place, token]) for place, token in enumerate(prompt[1:])]

    @classmethod
    def of(cls, base: Path, adapter: Path | None, *, dropping: str | None = None) -> "Engine":
        model: Any = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if dropping and dropping in name and ".lora_B." in name:
                        parameter.zero_()
        return cls(model.eval())


@pytest.fixture
def directory(adapter_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_directory, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def wanted(adapter_directory: Path, tiny_base: Path) -> parity.Reference:
    return parity.reference(adapter_directory, tiny_base)


def measure(wanted: parity.Reference, engine: Callable[[list[int]], Any]) -> Parity:
    return asyncio.run(parity.compare(wanted, engine, engine_name="PEFT"))


def test_an_engine_that_applies_the_adapter_passes_and_the_figure_is_kept(
    directory: Path, tiny_base: Path, wanted: parity.Reference
) -> None:
    before = contract.verify(directory)
    assert before.parity is None
    measured = measure(wanted, Engine.of(tiny_base, directory))
    parity.check(directory, measured)
    after = contract.verify(directory, base=contract.fingerprint(tiny_base))
    assert after.parity == measured
    assert measured.max_abs_logprob_difference <= PARITY_TOLERANCE
    assert measured.tokens == sum(len(prompt) - 1 for prompt in wanted.prompts)
    assert after.revision == before.revision, "measuring an adapter made another revision of it"
    assert "differ by at most" in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("dropping", "message"),
    [("lora_", "the engine seems to ignore it"), (".experts.", "the engine seems to ignore them")],
    ids=["the adapter", "its experts"],
)
def test_an_engine_that_drops_something_fails_and_the_gate_says_what(
    dropping: str, message: str, directory: Path, tiny_base: Path, wanted: parity.Reference
) -> None:
    measured = measure(wanted, Engine.of(tiny_base, directory, dropping=dropping))
    with pytest.raises(MixfuseError, match=f"parity failed.*{message}"):
        parity.check(directory, measured)
    assert contract.verify(directory).parity is None


def test_the_reference_measures_what_could_be_seen(tiny_base: Path, wanted: parity.Reference) -> None:
    dropped = measure(wanted, Engine.of(tiny_base, None))
    assert wanted.adapter_effect == pytest.approx(dropped.max_abs_logprob_difference, rel=1e-3)
    assert wanted.expert_effect is not None
    assert wanted.expert_effect > PARITY_TOLERANCE


def test_an_adapter_that_hardly_does_anything_cannot_be_judged(tiny_base: Path, tmp_path: Path) -> None:
    faint = harness.save_adapter(tiny_base, tmp_path / "faint", attention=True, experts=True, std=5e-4)
    export(faint, tmp_path / "out", base=tiny_base)
    measured = measure(parity.reference(tmp_path / "out", tiny_base), Engine.of(tiny_base, None))
    assert measured.max_abs_logprob_difference < PARITY_TOLERANCE, "an engine that ignores it would pass"
    with pytest.raises(MixfuseError, match="cannot be judged"):
        parity.check(tmp_path / "out", measured)


def test_attention_alone_has_no_expert_effect(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    export(peft_adapter(experts=False), tmp_path / "out", base=tiny_base)
    wanted = parity.reference(tmp_path / "out", tiny_base)
    assert wanted.expert_effect is None
    parity.check(tmp_path / "out", measure(wanted, Engine.of(tiny_base, tmp_path / "out")))


def test_what_peft_said_is_stored_for_a_swap_to_ask_again(
    directory: Path, tiny_base: Path, wanted: parity.Reference
) -> None:
    before = contract.verify(directory)
    parity.check(directory, measure(wanted, Engine.of(tiny_base, directory)), wanted)
    after = contract.verify(directory, base=contract.fingerprint(tiny_base))
    assert after.revision == before.revision
    assert contract.PROBES in after.files
    assert (directory / contract.PROBES).stat().st_size < 250_000
    probes = contract.read_probes(directory)
    assert probes is not None
    assert probes.tolerance == PARITY_TOLERANCE
    assert len(probes.logprobs) == len(wanted.prompts)
    # Cut to a beginning of each prompt, they are still what the adapter says: another engine passes them, the base no.
    for model, passes in ((directory, True), (None, False)):
        engine = Engine.of(tiny_base, model)
        for probe in probes.logprobs:
            answer = asyncio.run(engine(probe.tokens))
            worst = max(abs(one - other) for one, other in zip(answer, probe.logprobs, strict=True))
            assert (worst <= probes.tolerance) == passes
    # Measured a second time, the hashes are right again.
    parity.check(directory, measure(wanted, Engine.of(tiny_base, directory)), wanted)
    assert contract.verify(directory).files[contract.PROBES] == after.files[contract.PROBES]


def test_a_judges_verdicts_are_stored_as_the_runtime_reads_them(
    peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained judge's verdicts are not among its likeliest 20 tokens.
    monkeypatch.setattr(parity, "_CANDIDATES", 49152)
    export(peft_adapter(), tmp_path / "judge", base=tiny_base, role="judge")
    verdicts = parity.reference(tmp_path / "judge", tiny_base).probes().verdicts
    assert len(verdicts) == 2 * len(parity.COMPARISONS)
    tokenizer = load_tokenizer(tiny_base)
    spelled = {text: [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == text] for text in "AB"}
    model = PeftModel.from_pretrained(
        MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), str(tmp_path / "judge" / "peft")
    ).eval()
    for verdict in verdicts:
        ids = tokenizer.apply_chat_template(
            verdict.messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, -1].softmax(-1)
        a, b = (float(chances[spelled[text]].sum()) for text in "AB")
        assert verdict.p == pytest.approx(a / (a + b), abs=1e-5)
    assert len({verdict.p for verdict in verdicts}) > 1
    # A judge of another protocol than this version's would be asked in words it was not trained with.
    path = tmp_path / "judge" / contract.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judge_protocol": {"version": "0"}}))
    assert parity.reference(tmp_path / "judge", tiny_base).verdicts == ()


def test_the_figure_says_how_and_where_it_was_measured(wanted: parity.Reference, directory: Path) -> None:
    async def same(prompt: list[int]) -> list[float]:
        return wanted.logprobs[wanted.prompts.index(prompt)]

    measured = measure(wanted, same)
    assert (measured.engine, measured.dtype) == ("PEFT", "float32")
    assert measured.platform is not None
    assert platform.machine() in measured.platform
    assert measured.measured_at is not None
    age = datetime.now(UTC) - datetime.fromisoformat(measured.measured_at)
    assert timedelta() <= age + timedelta(seconds=1) < timedelta(minutes=10)


def test_a_signed_directory_passes_and_stays_signed(
    directory: Path, tiny_base: Path, wanted: parity.Reference, tmp_path: Path
) -> None:
    public = signing.generate(tmp_path / "key")
    contract.sign(directory, tmp_path / "key")
    before = (directory / contract.MANIFEST).read_bytes()
    parity.check(directory, measure(wanted, Engine.of(tiny_base, directory)), wanted)
    assert (directory / contract.MANIFEST).read_bytes() == before
    assert contract.verify(directory, trusted=(public,)).parity is None


def test_nan_from_the_engine_fails(directory: Path, wanted: parity.Reference) -> None:
    async def broken(prompt: list[int]) -> list[float]:
        rows = dict(zip(map(tuple, wanted.prompts), wanted.logprobs, strict=True))
        return [*rows[tuple(prompt)][:-1], float("nan")]

    with pytest.raises(MixfuseError, match="parity failed"):
        parity.check(directory, measure(wanted, broken))


def test_another_number_of_tokens_is_an_error(wanted: parity.Reference) -> None:
    async def short(prompt: list[int]) -> list[float]:
        return [0.0] * (len(prompt) - 2)

    with pytest.raises(MixfuseError, match="another number of tokens"):
        measure(wanted, short)


def test_weights_changed_while_parity_was_measured_are_not_blessed(directory: Path, wanted: parity.Reference) -> None:
    weights = directory / contract.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    good = Parity(
        max_abs_logprob_difference=0.0,
        tolerance=PARITY_TOLERANCE,
        adapter_effect=wanted.adapter_effect,
        expert_effect=wanted.expert_effect,
        tokens=1,
        dtype="float32",
        engine="PEFT",
    )
    parity.check(directory, good)
    with pytest.raises(MixfuseError, match="was changed after export"):
        contract.verify(directory)


def whole(directory: Path, base: Path, prompts: list[list[int]]) -> list[list[list[float]]]:
    """What PEFT says when it holds the whole model: under the adapter, of the base, and without the experts."""
    model = parity.peft_model(directory, base)
    found = [parity.logprobs(model, prompts)]
    with model.disable_adapter():
        found.append(parity.logprobs(model, prompts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name and ".lora_B." in name:
                parameter.zero_()
    return [*found, parity.logprobs(model, prompts)]


@pytest.mark.parametrize("kind", ["fused", "per expert", "attention", "one layer"])
def test_a_layer_at_a_time_says_what_the_whole_model_says(
    kind: str, peft_adapter: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    source = peft_adapter(experts=kind != "attention")
    if kind == "one layer":
        source = Path(shutil.copytree(source, tmp_path / "source"))
        weights = {
            name: tensor for name, tensor in load_file(source / contract.WEIGHTS).items() if ".layers.1." in name
        }
        save_file(weights, source / contract.WEIGHTS, metadata={"format": "pt"})
        config = json.loads((source / contract.CONFIG).read_text())
        config["target_parameters"] = [f"layers.1.{name}" for name in config["target_parameters"]]
        config["target_modules"] = [f"model.layers.1.self_attn.{name}" for name in config["target_modules"]]
        (source / contract.CONFIG).write_text(json.dumps(config))
    out = tmp_path / "out"
    export(source, out, base=tiny_base)
    if kind == "per expert":
        shutil.rmtree(out / "peft")
    prompts = [[5, 6, 7, 8, 9, 10], list(range(20, 90))]
    found = streams(out, tiny_base, prompts)
    expected = whole(out, tiny_base, prompts)
    pairs = [(found.adapted, expected[0]), (found.base, expected[1])]
    assert (found.no_experts is None) == (kind == "attention")
    if found.no_experts is not None:
        pairs.append((found.no_experts, expected[2]))
    for hidden, said in pairs:
        assert parity.worst_difference(found.logprobs(hidden, prompts), said) < 1e-4
    assert parity.worst_difference(expected[0], expected[1]) > 0.01


def test_no_more_than_one_layer_is_in_memory(
    adapter_directory: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    seen: list[int] = []
    build = layerwise._Base.layer

    def counted(self: Any, number: int) -> Any:
        gc.collect()
        seen.append(len(alive))
        layer = build(self, number)
        alive.add(layer)
        return layer

    monkeypatch.setattr(layerwise._Base, "layer", counted)
    parity.reference(adapter_directory, tiny_base)
    assert seen == [0, 0]


def test_an_adapter_of_layers_that_the_base_does_not_have_is_refused(
    adapter_directory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(adapter_directory, tmp_path / "out"))
    for folder in (out, out / "peft"):
        weights = load_file(folder / contract.WEIGHTS)
        save_file({name.replace(".layers.1.", ".layers.7."): tensor for name, tensor in weights.items()},
                  folder / contract.WEIGHTS, metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(MixfuseError, match="weights for layer 7, which the base does not have"):
        streams(out, tiny_base, [[5, 6, 7]])
