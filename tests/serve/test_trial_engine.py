"""The engine on which adapters are tried is the one that will serve them."""

from pathlib import Path

import pytest

from mixfuse.app.trial_engine import EngineChoice
from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve import engine as engine_module
from mixfuse.serve.engine import EngineConfig, command
from mixfuse.serve.precision import precision
from mixfuse.serve.vllm_arguments import split_of


def serve_config(folder: Path, engine: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(f"engine: {engine}\nfusion: fusion.yaml\n")
    return path


def test_a_serve_config_gives_all_its_settings(tmp_path: Path):
    text = (
        "{base: base, weights: awq, dtype: float16, max_model_len: 9000, max_lora_rank: 64, max_loras: 7, replicas: 3, "
        "extra_args: [--tensor-parallel-size=8, --enforce-eager]}"
    )
    path = serve_config(tmp_path, text)
    engine = EngineChoice(config=path).engine(None, rank=16)
    assert (engine.base, engine.weights, engine.dtype) == (Path("base"), Path("awq"), "float16")
    assert (engine.max_model_len, engine.max_lora_rank, engine.max_loras, engine.replicas) == (9000, 64, 7, 1)
    assert split_of(engine.extra_args).t == 8
    changed = EngineChoice(config=path, dtype="bfloat16", tensor_parallel_size=2).engine(Path("other"), rank=64)
    assert (changed.base, changed.dtype, split_of(changed.extra_args).t) == (Path("other"), "bfloat16", 2)
    assert "--enforce-eager" in changed.extra_args


@pytest.mark.parametrize(("cpu", "dtype"), [(True, "float32"), (False, "auto")])
def test_the_default_dtype_is_the_devices(monkeypatch: pytest.MonkeyPatch, cpu: bool, dtype: str):
    monkeypatch.setattr(engine_module, "cpu_build", lambda: cpu)
    engine = EngineChoice().engine(Path("base"), rank=5)
    assert engine.served_dtype == dtype
    assert engine.max_lora_rank == 8
    assert command(engine, 1)[command(engine, 1).index("--dtype") + 1] == dtype
    assert EngineChoice(dtype="float16", tensor_parallel_size=4).engine(Path("base"), rank=5).dtype == "float16"


def test_a_running_engine_has_its_key_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    choice = EngineChoice(url="http://10.0.0.5:8000")
    assert choice.engine(Path("base"), rank=8).external == ["http://10.0.0.5:8000/v1"]
    assert choice.engine(Path("base"), rank=8).api_key_env is None
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert choice.engine(Path("base"), rank=8).api_key_env == "VLLM_API_KEY"


@pytest.mark.parametrize(
    ("engine", "choice", "rank", "words"),
    [
        ("{base: b, max_lora_rank: 8}", {}, 16, "engine.max_lora_rank is 8, and the adapter's rank 16"),
        ("{base: b, url: 'http://h:1'}", {"tensor_parallel_size": 2}, 8, "its engines run already"),
        ("{base: b, url: 'http://h:1'}", {"dtype": "bfloat16"}, 8, "--dtype cannot change them; say in engine.dtype"),
        ("{base: b}", {"url": "http://h:1"}, 8, "leave --config and --tensor-parallel-size out"),
        (None, {"url": "http://h:1", "tensor_parallel_size": 2}, 8, "leave --config and --tensor-parallel-size out"),
        (None, {}, 8, "name the base model with --base, or a serve config"),
        (None, {}, 513, "rank 513 is above the largest that vLLM serves"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, engine: str | None, choice: dict, rank: int, words: str):
    config = serve_config(tmp_path, engine) if engine else None
    with pytest.raises(MixfuseError, match=words) as caught:
        EngineChoice(config=config, **choice).engine(None, rank=rank)
    assert "\n" not in str(caught.value)


def test_the_options_are_refused_where_nothing_heeds_them(tiny, capsys: pytest.CaptureFixture[str]):
    assert main(["adapter", "verify", str(tiny.served["one"]), "--dtype", "bfloat16"]) == 2
    assert "--dtype and --tensor-parallel-size are of the engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "stored", "arguments", "said"),
    [
        ("float32", "{}", [], "float32"),
        ("auto", '{"dtype": "float32"}', [], "bfloat16"),
        ("auto", '{"torch_dtype": "float16"}', [], "float16"),
        ("bfloat16", "{}", ["--quantization=fp8"], "bfloat16 fp8"),
        ("bfloat16", "{}", ["--quantization=fp8", "--kv-cache-dtype=fp8"], "bfloat16 fp8 fp8-kv"),
        ("float16", '{"quantization_config": {"quant_method": "awq"}}', [], "float16 awq"),
    ],
)
def test_the_number_format(tmp_path: Path, monkeypatch, dtype, stored: str, arguments: list[str], said: str):
    monkeypatch.setattr(engine_module, "cpu_build", lambda: False)
    (tmp_path / "config.json").write_text(stored)
    assert precision(EngineConfig(base=tmp_path, dtype=dtype, extra_args=arguments)) == said
