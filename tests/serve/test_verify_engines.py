"""`adapter verify` on engines that someone else runs: what they say is checked, and stored under the config's format.

The engines are stand-ins that answer over HTTP from weights in 4 bits; vLLM serves no adapters on such on a CPU.
"""

import asyncio
import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from stand_in import StandIn
from transformers import AutoTokenizer, MixtralForCausalLM

from mixfuse.app.server import ServeConfig
from mixfuse.cli.entry import main
from mixfuse.contracts import adapter, signing
from mixfuse.contracts.adapter import Probes
from mixfuse.contracts.chat_template import digest_for_engine
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import read_verdict
from mixfuse.contracts.strict_yaml import load
from mixfuse.serve import engine as engine_module
from mixfuse.serve.admission import Admission
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.precision import precision
from mixfuse.serve.probes import Terms
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.swap import Swapper
from mixfuse.train.adapters import parity

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import formats

FORMAT = "bfloat16 awq"
Row = list[float]


class Weights:
    """The tiny base with its weights in a format of `benchmarks/formats.py`, alone and with a judge's adapter."""

    def __init__(self, base: Path, fused: Path, format_: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        plain = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.adapted: Any = PeftModel.from_pretrained(plain, str(fused)).merge_and_unload().eval()
        self.said = cache(self._said)
        merged = dict(self.adapted.named_parameters())
        with torch.no_grad():
            for name, weight in self.base.named_parameters():
                if any(part in name for part in formats.ADAPTED):
                    rounded = formats.FORMATS[format_][1](weight)
                    merged[name] += rounded - weight
                    weight.copy_(rounded)

    @torch.no_grad()
    def _said(self, adapted: bool, prompt: tuple[int, ...]) -> torch.Tensor:
        """The log-probabilities of every token at every place."""
        model = self.adapted if adapted else self.base
        scores: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        return scores


class Quantised(StandIn):
    """An engine of those weights.

    Attributes:
        base_off: Added to what it says of every token.
        adapted_off: Added to what the adapter says of every other one.
        odds_off: Added to the log-odds of its verdicts.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.base_off = self.adapted_off = self.odds_off = 0.0
        super().__init__()

    def said(self, name: str, prompt: list[int]) -> Row:
        if not prompt:
            return []
        adapted = name != self.name
        rows = self.weights.said(adapted, tuple(prompt))
        off = self.adapted_off if adapted else 0.0
        return [float(rows[place, token]) + self.base_off + off * (place % 2) for place, token in enumerate(prompt[1:])]

    def first_tokens(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        tokenizer = self.weights.tokenizer
        prompt = parity.as_prompt(tokenizer, messages)
        row = self.weights.said(name != self.name, tuple(prompt))[-1].tolist()
        found = {tokenizer.decode([token]): value for token, value in enumerate(row)}
        return found | {"A": found["A"] + self.odds_off}


@pytest.fixture(scope="module")
def weights(tiny) -> Weights:
    return Weights(tiny.base, tiny.fused["two"], "bfloat16 int4")


@pytest.fixture
def engines(weights: Weights) -> Iterator[list[Quantised]]:
    made = [Quantised(weights), Quantised(weights)]
    yield made
    for engine in made:
        engine.stop()
    # A gateway asks for a load without a name, to see whether that needs a key.
    assert {name for engine in made for name in engine.adapters} <= {""}, "the adapter stayed in an engine"


@pytest.fixture
def judge(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # An untrained judge's verdicts are not among its likeliest 20 tokens.
    monkeypatch.setattr(parity, "_CANDIDATES", 320)
    # Fewer texts behind several beginnings: a test takes a third of the time.
    monkeypatch.setattr(parity, "_TEXTS", 4)
    monkeypatch.setattr(parity, "_BEGINNINGS", 4)
    return Path(shutil.copytree(tiny.served["two"], tmp_path / "judge"))


def serve_config(folder: Path, base: Path, **engine: Any) -> Path:
    path = folder / "serve.yaml"
    path.write_text(json.dumps({"engine": {"base": str(base), **engine}, "fusion": "fusion.yaml"}))  # JSON is YAML
    return path


def quantised(folder: Path, base: Path, engines: list[Quantised], **keys: Any) -> Path:
    urls = [engine.url for engine in engines]
    return serve_config(folder, base, urls=urls, **{"dtype": "bfloat16", "extra_args": ["--quantization=awq"], **keys})


def probes_of(directory: Path) -> Probes:
    found = adapter.read_probes(directory)
    assert found is not None
    return found


def test_what_running_engines_say_is_stored_under_the_format_of_the_config(
    judge: Path, tiny, engines: list[Quantised], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines[0].ranks = 2
    assert main(["adapter", "verify", str(judge), "--config", str(quantised(tmp_path, tiny.base, engines))]) == 0
    assert [{copy for copy, _ in engine.asked} for engine in engines] == [{"0", "1"}, {None}]
    said = capsys.readouterr().out
    assert f"the engine's as those of {FORMAT}, which swaps there compare with" in said
    assert said.count("\n") == 1
    manifest, probes = adapter.verify(judge), probes_of(judge)
    assert manifest.parity is not None
    assert manifest.parity.engine in {f"vllm at {engine.url}/v1" for engine in engines}
    assert list(probes.measured) == [FORMAT]
    kept = probes.measured[FORMAT]
    for rows, name in ((kept.logprobs, "judge"), (kept.base, "base")):
        for row, probe in zip(rows, probes.logprobs, strict=True):
            assert row == pytest.approx(engines[0].said(name, probe.tokens[: len(row) + 1]), abs=1e-4)
    ps = [read_verdict(engines[0].first_tokens("judge", probe.messages)) for probe in probes.verdicts]
    assert len(ps) == 2 * len(parity.COMPARISONS)
    assert kept.verdicts == pytest.approx(ps, abs=1e-5)
    off = max(abs(p - probe.p) for p, probe in zip(kept.verdicts, probes.verdicts, strict=True))
    assert off > 0.05, "the format moves no verdict, so it does not matter which are compared"
    assert f"its verdicts differ by up to {off:.2g}" in said


def test_what_an_engine_at_a_url_says_is_not_stored_and_what_was_stays(
    judge: Path, tiny, engines: list[Quantised], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_url = ["adapter", "verify", str(judge), "--base", str(tiny.base), "--url", engines[0].url]
    assert main(at_url) == 0
    assert "the engine's are not, because its number format is not known" in capsys.readouterr().out
    assert probes_of(judge).measured == {}
    assert main(["adapter", "verify", str(judge), "--config", str(quantised(tmp_path, tiny.base, engines))]) == 0
    other = quantised(tmp_path, tiny.base, engines[:1], extra_args=["--quantization=gptq"])
    assert main(["adapter", "verify", str(judge), "--config", str(other)]) == 0
    assert main(at_url) == 0
    assert set(probes_of(judge).measured) == {FORMAT, "bfloat16 gptq"}
    adapter.verify(judge)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_off": 0.5}, "the base is not the same in all engines"),
        ({"adapted_off": 0.1}, r"differs from vllm at .* in bfloat16 awq: its log-probabilities are off by"),
        ({"odds_off": 1.0}, r"differs from vllm at .* in bfloat16 awq: its verdict on stored comparison 1 is"),
    ],
    ids=["base", "adapter", "verdicts"],
)
def test_engines_of_one_config_that_differ_are_refused_and_nothing_is_stored(
    judge: Path,
    tiny,
    engines: list[Quantised],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, float],
    words: str,
) -> None:
    """Each of them alone passes: what 4 bits do to the weights hides far more."""
    for name, value in changes.items():
        setattr(engines[1], name, value)
    alone = Path(shutil.copytree(judge, tmp_path / "alone"))
    assert main(["adapter", "verify", str(alone), "--config", str(quantised(tmp_path, tiny.base, engines[1:]))]) == 0
    before = (judge / adapter.MANIFEST).read_bytes()
    capsys.readouterr()
    assert main(["adapter", "verify", str(judge), "--config", str(quantised(tmp_path, tiny.base, engines))]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1
    assert (judge / adapter.MANIFEST).read_bytes() == before
    assert adapter.read_probes(judge) is None


def test_a_judge_that_says_other_verdicts_than_in_peft_is_refused(
    judge: Path, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Quantised(Weights(tiny.base, tiny.fused["two"], "float32"))
    try:
        config = str(serve_config(tmp_path, tiny.base, url=engine.url, dtype="float32"))
        engine.odds_off = 0.01
        assert main(["adapter", "verify", str(judge), "--config", config]) == 2
        assert re.search(r"parity failed in float32: .*its verdict on stored comparison 1 is", capsys.readouterr().err)
        assert not engine.adapters
        engine.odds_off = 0.0
        assert main(["adapter", "verify", str(judge), "--config", config]) == 0
        assert capsys.readouterr().out.endswith("; stored: PEFT's answers\n")
        assert probes_of(judge).measured == {}
    finally:
        engine.stop()


def test_nothing_is_stored_in_a_signed_directory(
    judge: Path, tiny, engines: list[Quantised], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signing.generate(tmp_path / "key")
    adapter.sign(judge, tmp_path / "key")
    config = quantised(tmp_path, tiny.base, engines[:1])
    assert main(["adapter", "verify", str(judge), "--config", str(config)]) == 0
    assert "; nothing is stored, because the manifest is signed\n" in capsys.readouterr().out
    assert adapter.read_probes(judge) is None


async def test_a_swap_there_compares_verdicts_with_what_the_engine_said(
    judge: Path, tiny, engines: list[Quantised], tmp_path: Path
) -> None:
    path = quantised(tmp_path, tiny.base, engines[:1])
    config = load(path, ServeConfig).engine

    async def swap() -> None:
        terms = Terms(None, precision(config))
        admission = Admission(
            adapter.fingerprint(tiny.base), 16, terms=terms, copies=AdapterCopies(tmp_path / "copies")
        )
        async with EngineGroup(config, logs=tmp_path) as group:
            swapper = Swapper(RoleTable(group, ["judge"], admission))
            try:
                await swapper.swap("judge", judge)
                await group.unload_adapter(swapper.table.serving()["judge"].model)
            finally:
                await swapper.close()

    plain = ["adapter", "verify", str(judge), "--base", str(tiny.base), "--url", engines[0].url]
    assert await asyncio.to_thread(main, plain) == 0
    engines[0].odds_off = 1.0
    await swap()  # against PEFT alone, any verdict passes
    engines[0].odds_off = 0.0
    assert await asyncio.to_thread(main, ["adapter", "verify", str(judge), "--config", str(path)]) == 0
    await swap()
    engines[0].odds_off = 1.0
    with pytest.raises(MixfuseError, match=r"stored comparison 1 .*when it was verified in bfloat16 awq, and 0\.05 is"):
        await swap()


@pytest.fixture
def dead_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in vLLM's place that keeps the chat template it was given, and ends."""
    kept = tmp_path / "template"
    program = f"import pathlib, sys; pathlib.Path({str(kept)!r}).write_text(sys.argv[1]); raise ValueError('ended')"
    monkeypatch.setattr(
        engine_module,
        "command",
        lambda config, port, template: [sys.executable, "-c", program, template.read_text() if template else ""],
    )
    monkeypatch.setattr(engine_module, "find_spec", lambda name: name)
    return kept


def test_a_judge_is_asked_in_the_chat_template_of_its_training(
    judge: Path, tiny, dead_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}")
    path = judge / adapter.MANIFEST
    trained = {"recipe": {"chat_template": str(own)}, "chat_template": digest_for_engine(tiny.base, str(own))}
    path.write_text(json.dumps(json.loads(path.read_text()) | trained))
    assert main(["adapter", "verify", str(judge), "--config", str(serve_config(tmp_path, tiny.base))]) == 2
    assert "own.jinja, and the engine writes chats with another text" in capsys.readouterr().err
    assert not dead_engine.exists(), "an engine was started in vain"
    assert main(["adapter", "verify", str(judge), "--base", str(tiny.base)]) == 2
    assert "ValueError: ended" in capsys.readouterr().err
    assert "<{{ m['role'] }}>" in dead_engine.read_text()
