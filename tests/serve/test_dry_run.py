"""`mixfuse serve --dry-run` prints the command that would be run and whether it fits, and starts nothing."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.family import base_parameters
from mixfuse.serve import engine_plan
from mixfuse.serve.engine import EngineConfig, Restart

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted(ROOT.glob("configs/*/serve*.yaml"))
MIXTRAL_8X22B = json.loads((ROOT / "configs/mixtral-8x22b/model/config.json").read_text())
GIB = 1 << 30

VLLMS_PARSER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
for line in sys.stdin:
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(line))
    validate_parsed_serve_args(arguments)
    print("parsed:" + json.dumps({name: value for name, value in vars(arguments).items()
        if value is None or isinstance(value, (str, int, float, bool, list))}))
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs count from the project's folder."""
    monkeypatch.chdir(ROOT)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["serve", *map(str, arguments), "--dry-run"])
    return status, capsys.readouterr().out


def test_vllm_knows_every_flag_of_every_config(capsys: pytest.CaptureFixture[str]):
    """By the parser of the vLLM that is installed; its build for CPUs has the same one."""
    printed = {path: dry_run(capsys, path, "--device", "cuda")[1].splitlines()[0] for path in CONFIGS}
    commands = {path: shlex.split(line) for path, line in printed.items()}
    lines = [json.dumps(words[words.index("vllm.entrypoints.openai.api_server") + 1 :]) for words in commands.values()]
    program = [sys.executable, "-c", VLLMS_PARSER]
    done = subprocess.run(program, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.removeprefix("parsed:") for line in done.stdout.splitlines() if line.startswith("parsed:")]
    parsed = dict(
        zip((str(path.relative_to(ROOT / "configs")) for path in commands), map(json.loads, answers), strict=True)
    )
    for options in parsed.values():
        assert options["enable_lora"]
        assert options["lora_target_modules"][-1] == "experts"
    fp8, awq = parsed["mixtral-8x22b/serve_fp8.yaml"], parsed["mixtral-8x22b/serve_awq.yaml"]
    assert (fp8["quantization"], fp8["moe_backend"], fp8["tensor_parallel_size"]) == ("fp8", "triton", 8)
    assert (awq["model"], awq["tokenizer"]) == (
        "models/Mixtral-8x22B-Instruct-v0.1-AWQ",
        "models/Mixtral-8x22B-Instruct-v0.1",
    )
    two = parsed["mixtral-8x22b/serve_two_nodes.yaml"]
    assert (two["tensor_parallel_size"], two["pipeline_parallel_size"]) == (8, 2)
    assert two["distributed_executor_backend"] == "ray"


def test_the_exit_code_says_whether_it_fits(capsys: pytest.CaptureFixture[str]):
    config = ROOT / "configs/mixtral-8x22b/serve.yaml"
    status, printed = dry_run(capsys, config, "--device", "cuda")
    assert status == 0
    assert "weights          32.7 GiB" in printed
    assert printed.splitlines()[-1] == "fits"
    status, printed = dry_run(capsys, config, "engine.max_loras=64", "--device", "cuda", "--gpu-memory", "40GiB")
    assert status == 1
    assert "does NOT fit" in printed
    status, printed = dry_run(capsys, config, "engine.replicas=2", "--device", "cuda")
    assert status == 1
    assert "2 x TP 8 x PP 1 needs 16 GPUs and there are 8" in printed
    assert "CUDA_VISIBLE_DEVICES=8,9,10,11,12,13,14,15" in printed


def test_secrets_are_not_shown_and_values_are_quoted(capsys: pytest.CaptureFixture[str]):
    changes = [
        "engine.env={HF_TOKEN: abc, WHERE: a b}",
        "engine.extra_args=[--api-key, def, --ssl-keyfile-password=ghi, --max-num-batched-tokens=8192]",
    ]
    _, printed = dry_run(capsys, ROOT / "configs/mixtral-8x22b/serve.yaml", *changes)
    line = printed.splitlines()[0]
    for secret in ("abc", "def", "ghi"):
        assert secret not in line
    assert " HF_TOKEN=... WHERE='a b' VLLM_API_KEY=... " in line
    assert line.endswith(" --api-key ... --ssl-keyfile-password=... --max-num-batched-tokens=8192")


def test_an_engine_of_someone_else_is_not_planned(capsys: pytest.CaptureFixture[str]):
    status, printed = dry_run(capsys, ROOT / "configs/mixtral-8x22b/serve.yaml", "engine.url=http://10.0.0.5:8000")
    assert status == 0
    assert "runs elsewhere (http://10.0.0.5:8000/v1)" in printed


def test_the_engines_page_shows_configs_that_load():
    page = (ROOT / "docs/engine.md").read_text(encoding="utf-8")
    own, others = (
        EngineConfig.model_validate(yaml.safe_load(block)["engine"])
        for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    )
    assert own.restart == Restart(), "the page names other defaults"
    assert own.replicas == len(others.external) == 2


def weights(config: dict[str, object], *arguments: str) -> int:
    engine = EngineConfig(base=Path("base"), dtype="bfloat16", extra_args=list(arguments))
    return engine_plan.plan(engine, config, gpus=8, gpu_bytes=80 * GIB, concurrency=1).parts["weights"]


def test_what_is_quantised_is_what_the_plan_shrinks():
    """Attention and experts are; embedding, output layer, routers and norms are not."""
    shape = shape_of(MIXTRAL_8X22B)
    dense = 2 * shape.V * shape.H + shape.L * (shape.E * shape.H + 2 * shape.H) + shape.H
    linear = base_parameters(shape) - dense
    assert weights(MIXTRAL_8X22B) == 2 * (linear + dense)
    assert weights(MIXTRAL_8X22B, "--quantization=fp8") == linear + 2 * dense
    # 4 bits a weight, and 16 + 4 for each 128 of them
    awq = linear * (4 + 20 / 128) / 8 + 2 * dense
    assert weights(MIXTRAL_8X22B, "-q", "awq_marlin") == pytest.approx(awq, abs=1)
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    assert weights(MIXTRAL_8X22B | quantized) == pytest.approx(awq, abs=1)
    with pytest.raises(MixfuseError, match="not 'gptq'"):
        weights(MIXTRAL_8X22B, "--quantization", "gptq")


def test_keys_and_values_in_fp8_take_half():
    plans = [
        engine_plan.plan(
            EngineConfig(base=Path("base"), dtype="bfloat16", extra_args=extra),
            MIXTRAL_8X22B,
            gpus=8,
            gpu_bytes=80 * GIB,
            concurrency=1,
        ).kv_per_token
        for extra in (["-tp=8"], ["-tp=8", "--kv-cache-dtype=fp8"])
    ]
    assert plans[0] == 2 * plans[1]
