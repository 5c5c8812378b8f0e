"""Plans a training recipe or a serve config and prints the plan: `mixfuse plan` and `mixfuse serve --dry-run`."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load

if TYPE_CHECKING:
    from mixfuse.serve.engine_plan import Change, ServePlan

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


class PlanReport(NamedTuple):
    """A plan in three forms.

    Attributes:
        data: The object that `--json` prints.
        text: The text for people.
        header: The memory line of a recipe's header.
    """

    data: dict[str, Any]
    text: str
    header: str


def size(text: str) -> int:
    """Parses `80GiB`, `80GB` or a number of bytes.

    Returns:
        The size in bytes.

    Raises:
        MixfuseError: The text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS or match[2] == "i":
        raise MixfuseError(f"{text!r} is not a size; write 80GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def print_plan(arguments: Any) -> None:
    """Plans a training recipe or a serve config and prints the plan; with `--json` its last line is JSON.

    Args:
        arguments: The options of `mixfuse plan`.

    Raises:
        MixfuseError: The file, an override, a size or the base's config is invalid.
    """
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        raise MixfuseError("--nodes and --gpus-per-node must be at least 1")
    report = _plan_serving(arguments) if _is_serve_config(arguments.recipe) else _plan_training(arguments)
    print(report.header if arguments.header else report.text)
    if arguments.json:
        print(json.dumps(report.data))


def dry_run(arguments: Any) -> int:
    """Prints the command and the memory plan of each engine, and starts nothing (`mixfuse serve --dry-run`).

    Args:
        arguments: The options of `mixfuse serve`.

    Returns:
        0 if the plan fits, 1 if it does not.

    Raises:
        MixfuseError: The config or an adapter is invalid, as for `mixfuse serve`.
    """
    from mixfuse.app.server import configs
    from mixfuse.serve.engine import command, cpu_build, environment
    from mixfuse.serve.engine_group import per_replica

    config, _ = configs(arguments.config, arguments.overrides)
    if others := config.engine.external:
        print(f"{arguments.config}: the engine runs elsewhere ({', '.join(others)}); nothing would be started")
        return 0
    device = arguments.device or ("cpu" if cpu_build() else "cuda")
    cpu = device == "cpu"
    for engine in per_replica(config.engine, cpu=cpu):
        settings = [f"{name}={value}" for name, value in environment(engine, cpu=cpu).items()]
        print(_shell([*settings, "VLLM_API_KEY=", *command(engine, engine.port or 0, cpu=cpu)]), end="\n\n")
    print("VLLM_API_KEY is new at every start" + ("" if config.engine.port else "; port 0 stands for a free port"))
    options = vars(arguments) | {"recipe": arguments.config, "device": device, "concurrency": None}
    report = _plan_serving(argparse.Namespace(**options))
    print(report.text)
    return 0 if report.data["fits"] else 1


def _shell(words: list[str]) -> str:
    """Formats a command line, without the values of options and variables that are named like secrets."""
    shown, is_secret_value = [], False
    for word in words:
        name, equals, value = word.partition("=")
        secret = re.search(r"(?:^|[-_])(?:key|token|secret|password)$", name, re.IGNORECASE) is not None
        if is_secret_value or (secret and equals):
            shown.append(f"{name}=..." if equals else "...")
        else:
            shown.append(f"{name}={shlex.quote(value)}" if equals and name.isidentifier() else shlex.quote(word))
        is_secret_value = secret and not equals
    return " ".join(shown)


def _is_serve_config(path: Path) -> bool:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load` reports the error
    return isinstance(data, dict) and "engine" in data


def _plan_training(arguments: Any) -> PlanReport:
    from mixfuse.contracts.files import read_json
    from mixfuse.train.planning import training_plan
    from mixfuse.train.recipe import kind_of

    recipe = load(arguments.recipe, kind_of(arguments.recipe, arguments.overrides), arguments.overrides)
    config, config_path = training_plan.find_config(recipe, arguments.recipe, arguments.model)
    cuda = arguments.device == "cuda"
    host = size(arguments.host_memory) if arguments.host_memory else None
    hardware = training_plan.Hardware(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        # Without a GPU, the processes share the host's memory.
        gpu_bytes=size(arguments.gpu_memory) if cuda else (host or sys.maxsize) // arguments.gpus_per_node,
        host_bytes=host,
        reserve_bytes=size(arguments.reserve) if cuda else 0,
        cuda=cuda,
    )
    zero3 = read_json(recipe.deepspeed)
    training_plan.count_on_meta(config)
    plan = training_plan.plan(recipe, config, zero3, hardware, source=f"{arguments.recipe} ({config_path})")
    advice = [] if plan.fits else training_plan.advise(recipe, config, zero3, hardware)
    bandwidth = arguments.bandwidth or (50.0 if arguments.nodes > 1 else 450.0)
    assumed = {
        "peak TFLOP/s a GPU": arguments.tflops,
        "utilisation": arguments.utilisation,
        "GB/s received a GPU": bandwidth,
    }
    estimate = None
    if cuda:
        estimate = training_plan.speed(
            plan, tflops=arguments.tflops, utilisation=arguments.utilisation, bandwidth=bandwidth * 1e9
        )
    return PlanReport(
        training_plan.to_json(plan, advice, estimate, assumed),
        training_plan.to_text(plan, advice, estimate, assumed),
        f"{training_plan.header(plan)}: `{_command(arguments)}`",
    )


def _command(arguments: Any) -> str:
    """Returns the command that prints this plan."""
    words = ["mixfuse", "plan", str(arguments.recipe), *arguments.overrides]
    words += ["--nodes", str(arguments.nodes), "--gpus-per-node", str(arguments.gpus_per_node)]
    words += ["--model", str(arguments.model)] if arguments.model else []
    words += ["--device", "cpu"] if arguments.device == "cpu" else ["--gpu-memory", arguments.gpu_memory]
    return shlex.join(words)


def _plan_serving(arguments: Any) -> PlanReport:
    from mixfuse.app.server import ServeConfig
    from mixfuse.contracts.files import read_json
    from mixfuse.serve import engine_plan

    engine = load(arguments.recipe, ServeConfig, arguments.overrides).engine
    file = _find_config(arguments.model, engine.weights or engine.base, arguments.recipe.parent / "model")
    config = read_json(file)
    cpu = arguments.device == "cpu"
    hardware = {"gpus": arguments.nodes * arguments.gpus_per_node, "gpu_bytes": size(arguments.gpu_memory)}
    concurrency = arguments.concurrency or 1
    plan = engine_plan.plan(engine, config, **hardware, concurrency=concurrency, cpu=cpu)
    advice = [] if plan.fits or cpu else engine_plan.advise(engine, config, **hardware, concurrency=concurrency)
    header = (
        f"{_gib(sum(plan.parts.values()))} a {'process' if cpu else 'GPU'}, "
        f"{_gib(max(0, plan.kv_room))} left for keys and values: `{_command(arguments)}`"
    )
    text = _serving_text(plan, advice, f"{arguments.recipe} ({file})", "process" if cpu else "GPU")
    return PlanReport(_serving_json(plan, advice, arguments.recipe), text, header)


def _find_config(model: Path | None, *folders: Path | str) -> Path:
    """Finds the base's `config.json`: in `--model` if set, else in the first folder that holds one.

    Raises:
        MixfuseError: None of them holds one.
    """
    places = [Path(place) for place in ([model] if model else folders)]
    files = [place if place.is_file() else place / "config.json" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MixfuseError(f"no config.json in {' or '.join(map(str, places))}; name its folder: --model DIR")
    return file


def _serving_json(plan: "ServePlan", advice: Sequence["Change"], recipe: Path) -> dict[str, Any]:
    return {
        "kind": "serving",
        "recipe": str(recipe),
        "base_parameters": plan.parameters,
        "tensor_parallel": plan.split.t,
        "pipeline_parallel": plan.split.p,
        "per_gpu_bytes": {**plan.parts, "kv_cache": plan.kv_needed, "total": plan.total},
        "kv_bytes_per_token": plan.kv_per_token,
        "kv_room_bytes": plan.kv_room,
        "concurrency": plan.concurrency,
        "length": plan.length,
        "most_at_once": plan.most,
        "fits": plan.fits,
        "problems": list(plan.problems),
        "advice": [change._asdict() for change in advice],
    }


def _serving_text(plan: "ServePlan", advice: Sequence["Change"], source: str, unit: str) -> str:
    parts = {**plan.parts, "kv_cache": plan.kv_needed, "total": plan.total}
    lines = [
        f"{source}: TP {plan.split.t} x PP {plan.split.p}, {plan.parameters / 1e9:.2f} B parameters",
        f"per {unit}, with {plan.concurrency} x {plan.length} tokens in the cache:",
        *(f"  {name:14} {_gib(count):>10}" for name, count in parts.items()),
        f"room for keys and values: {_gib(max(0, plan.kv_room))}, {plan.kv_per_token:,} bytes a token: "
        f"{plan.most} requests of {plan.length} tokens at once",
        "fits" if plan.fits else "does NOT fit: " + "; ".join(plan.problems),
        *(f"  fits with {change.change}: {_gib(change.gpu_bytes)} a {unit}" for change in advice),
    ]
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
