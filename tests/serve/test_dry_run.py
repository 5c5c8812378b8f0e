"""`mixfuse serve --dry-run` prints the command that would be run and whether it fits, and starts nothing."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mixfuse.app.server import ServeConfig
from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.family import base_parameters
from mixfuse.contracts.strict_yaml import load
from mixfuse.serve import engine_plan
from mixfuse.serve.engine import EngineConfig, Restart, command

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
    models = Path.cwd() / "models"  # workers on other nodes have another working directory
    assert (awq["model"], awq["tokenizer"]) == (
        str(models / "Mixtral-8x22B-Instruct-v0.1-AWQ"),
        str(models / "Mixtral-8x22B-Instruct-v0.1"),
    )
    assert int(awq["max_cpu_loras"]) > len(load(ROOT / "configs/mixtral-8x22b/serve_awq.yaml", ServeConfig).roles)
    two = parsed["mixtral-8x22b/serve_two_nodes.yaml"]
    assert (two["tensor_parallel_size"], two["pipeline_parallel_size"]) == (8, 2)
    assert two["distributed_executor_backend"] == "ray"
    assert " VLLM_HOST_IP=10.0.0.1 " in printed[ROOT / "configs/mixtral-8x22b/serve_two_nodes.yaml"]
    tiny = parsed["tiny/serve.yaml"]
    assert (tiny["dtype"], awq["dtype"]) == ("auto", "float16")  # vLLM takes what the base's files have
    assert (two["enable_auto_tool_choice"], two["tool_call_parser"]) == (True, "mistral")
    assert (tiny["enable_auto_tool_choice"], tiny["tool_call_parser"]) == (False, None)


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
        "engine.extra_args=[--hf-token, def, --ssl-keyfile-password=ghi, --max-num-batched-tokens=8192]",
    ]
    _, printed = dry_run(capsys, ROOT / "configs/mixtral-8x22b/serve.yaml", *changes)
    line = printed.splitlines()[0]
    for secret in ("abc", "def", "ghi"):
        assert secret not in line
    assert " HF_TOKEN=... WHERE='a b' MIXFUSE_ENGINE_KEY_FILE=FILE " in line
    assert line.endswith(" --hf-token ... --ssl-keyfile-password=... --max-num-batched-tokens=8192")


def test_an_engine_of_someone_else_is_not_planned(capsys: pytest.CaptureFixture[str]):
    status, printed = dry_run(capsys, ROOT / "configs/mixtral-8x22b/serve.yaml", "engine.url=http://10.0.0.5:8000")
    assert status == 0
    assert "runs elsewhere (http://10.0.0.5:8000/v1)" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data-parallel-size=2", "--api-server-count=2"], "with one API server only"),
        (["-asc", "2"], "with one API server only"),
        (["--data-parallel-size=2", "--data-parallel-hybrid-lb"], "start more engines with `replicas`"),
        (["-dpn", "1"], "start more engines with `replicas`"),
        (["--headless"], "through one API server"),
        (["--enable-expert-parallel", "--all2all-backend=deepep_low_latency"], "needs --all2all-backend=allgather"),
        (["-ep", "--fully-sharded-loras"], "together with --fully-sharded-loras"),
        (["-ep", "-tp", "2", "-dp", "2"], "tensor or with data parallelism, not with both"),
        (["--host", "0.0.0.0"], "--host would override the config; use engine.host"),
        (["--max_loras=2"], "use engine.max_loras"),
        (["--tensor_parallel_size", "0"], "a parallel size is from 1"),
        (["--nnodes=2"], "set `node_ip`"),
        (["--distributed-executor-backend", "ray"], "send each other pickled messages"),
    ],
)
def test_what_vllm_could_not_serve_adapters_with_is_refused(arguments: list[str], words: str):
    with pytest.raises(ValidationError, match=re.escape(words)):
        EngineConfig(base=Path("base"), extra_args=arguments)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("8.8.8.8", "no address of a private network"),
        ("127.0.0.1", "no address of a private network"),
        ("0.0.0.0", "no address of a private network"),
        ("head", "is no IP address"),
    ],
)
def test_nodes_meet_in_a_private_network(address: str, words: str):
    with pytest.raises(ValidationError, match=words):
        EngineConfig(base=Path("base"), extra_args=["--distributed-executor-backend=ray"], node_ip=address)


def test_a_node_ip_without_nodes_is_refused():
    with pytest.raises(ValidationError, match="for an engine on several nodes"):
        EngineConfig(base=Path("base"), node_ip="10.0.0.1")


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "VLLM_HOST_IP", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_variables_that_are_set_here_are_refused(name: str):
    with pytest.raises(ValidationError, match=f"{name}: "):
        EngineConfig(base=Path("base"), env={name: "x"})


@pytest.mark.parametrize("arguments", [["-ep", "-tp=8"], ["-ep", "-dp=8"], ["--data-parallel-size=2", "-asc=1"]])
def test_what_vllm_allows_is_taken(arguments: list[str]):
    EngineConfig(base=Path("base"), extra_args=arguments)


def test_the_parser_of_tool_calls_is_the_familys(tmp_path: Path):
    for model_type, parser in (("mixtral", "mistral"), ("qwen3_moe", "hermes")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        words = command(EngineConfig(base=tmp_path, tool_parser="family"), 1, cpu=False)
        assert words[words.index("--enable-auto-tool-choice") :][:3] == [
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            parser,
        ]
    assert "hermes" in command(EngineConfig(base=Path("base"), tool_parser="hermes"), 1, cpu=False)


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
    for symmetric, zero_point in ((True, 0), (False, 4)):
        scheme = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": symmetric}
        group = {"group_0": {"targets": ["Linear"], "weights": scheme}}
        packed = {"quant_method": "compressed-tensors", "config_groups": group, "ignore": ["lm_head", "re:.*gate$"]}
        expected = linear * (4 + (16 + zero_point) / 128) / 8 + 2 * dense
        assert weights(MIXTRAL_8X22B | {"quantization_config": packed}) == pytest.approx(expected, abs=1)
    for wrong, words in (
        ({"ignore": ["re:.*self_attn.*"]}, "leaves out 're:.*self_attn"),
        ({"config_groups": {}}, "there are 0"),
        ({"config_groups": {"group_0": {"targets": ["re:.*experts.*"], "weights": scheme}}}, "targets"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 99}}}}, "num_bits"),
    ):
        with pytest.raises(MixfuseError, match=words):
            weights(MIXTRAL_8X22B | {"quantization_config": packed | wrong})
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


def planned(*arguments: str, gpus: int = 8, **keys: object) -> engine_plan.ServePlan:
    engine = EngineConfig(base=Path("base"), extra_args=list(arguments), **keys)
    return engine_plan.plan(engine, MIXTRAL_8X22B, gpus=gpus, gpu_bytes=80 * GIB, concurrency=8)


def test_data_parallel_copies_are_counted_and_share_the_experts():
    """Attention is copied, experts are divided over all GPUs; with expert parallelism each is whole."""
    one, two = planned("-tp=8"), planned("-tp=4", "-dp=2")
    shape = shape_of(MIXTRAL_8X22B)
    attention = shape.L * (shape.H * (shape.A + 2 * shape.G) * shape.D + shape.A * shape.D * shape.H)
    ends = 2 * shape.V * shape.H
    assert two.parts["weights"] - one.parts["weights"] == 2 * (attention + ends) // 8
    assert planned("-dp=8", "-ep").parts["weights"] == planned("-dp=8").parts["weights"]
    assert one.kv_needed == 8 * 1024 * one.kv_per_token
    assert two.kv_needed == 4 * 1024 * two.kv_per_token
    assert two.most % 2 == 0
    problem = planned("-tp=4", "-dp=2", replicas=2).problems[0]
    assert problem == "2 x TP 4 x PP 1 x DP 2 needs 16 GPUs and there are 8"


def test_the_plan_knows_cuda_graphs():
    """With 256 sequences, vLLM captures 51 sizes in pieces and 35 of them whole, each with and without LoRA."""
    with_graphs, without = planned("-tp=8", max_num_seqs=256), planned("-tp=8", "--enforce-eager", max_num_seqs=256)
    assert "cuda_graphs" not in without.parts
    assert without.kv_room - with_graphs.kv_room == with_graphs.parts["cuda_graphs"]
    graphs = 2 * (51 + 35) * 56 * (128 << 10)
    shape, split = shape_of(MIXTRAL_8X22B), with_graphs.split
    batch = engine_plan.activations(shape, split, 2, tokens=512, sequences=256)
    assert with_graphs.parts["cuda_graphs"] == graphs + batch
    fewer = planned("-tp=8", "--max-cudagraph-capture-size=8", max_num_seqs=256).parts["cuda_graphs"]
    assert fewer == 2 * 8 * 56 * (128 << 10) + engine_plan.activations(shape, split, 2, tokens=8, sequences=8)


def test_the_plan_knows_the_pinned_memory_of_adapters():
    """Each of 8 processes holds each cached adapter whole: 1.04 GB at rank 16, more as its pieces are rounded up."""
    plan = planned("-tp=8", max_cpu_loras=4)
    assert 8 * 4 * 1.03e9 < plan.pinned < 1.2 * 8 * 4 * 1.04e9
    assert planned("-tp=2", max_cpu_loras=4).pinned * 4 == plan.pinned
    assert planned("-tp=8", "-ep", max_cpu_loras=4).pinned < plan.pinned / 3
    engine = EngineConfig(base=Path("base"), extra_args=["-tp=8"], max_cpu_loras=4)
    small = engine_plan.plan(engine, MIXTRAL_8X22B, gpus=8, gpu_bytes=80 * GIB, concurrency=1, host=(GIB, 8))
    assert "8 GPUs of a host x 4 cached adapters take" in small.problems[0]


def test_float32_is_for_cpus():
    problem = planned("-tp=8", dtype="float32").problems[0]
    assert "vLLM's kernels for LoRA on GPUs take bfloat16 and float16" in problem
    words = command(EngineConfig(base=Path("base")), 1, cpu=True)
    assert words[words.index("--dtype") + 1] == "float32"
