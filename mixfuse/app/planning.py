"""`mixfuse plan`: finds out whose plan a file asks for and on what hardware, asks the room, and prints the plan."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def size(text: str) -> int:
    """Reads `80GiB`, `80GB` or a number of bytes.

    Raises:
        MixfuseError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS or match[2] == "i":
        raise MixfuseError(f"{text!r} is no size; write 80GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def run(arguments: Any) -> None:
    """Plans a training recipe or a serve config, and prints the plan; its last line is JSON where that is asked for.

    Raises:
        MixfuseError: The file, an override, a size or the base's config is bad.
    """
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        raise MixfuseError("--nodes and --gpus-per-node are at least 1")
    if _is_serving(arguments.recipe):
        result, text, line = _serving(arguments)
    else:
        result, text, line = _training(arguments)
    print(line if arguments.header else text)
    if arguments.json:
        print(json.dumps(result))


def dry_run(arguments: Any) -> int:
    """`mixfuse serve --dry-run`: prints the command of each engine and its memory plan, and starts nothing.

    Returns:
        0 where it fits, 1 where it does not.

    Raises:
        MixfuseError: As for `mixfuse serve` before it starts anything.
    """
    from mixfuse.app.server import configs
    from mixfuse.serve.engine import command, cpu_build, environment
    from mixfuse.serve.engine_group import per_replica

    config, _ = configs(arguments.config, arguments.overrides)
    if others := config.engine.external:
        print(f"{arguments.config}: the engine is someone else's ({', '.join(others)}); nothing would be started")
        return 0
    device = arguments.device or ("cpu" if cpu_build() else "cuda")
    cpu = device == "cpu"
    for engine in per_replica(config.engine, cpu=cpu):
        settings = [f"{name}={value}" for name, value in environment(engine, cpu=cpu).items()]
        print(_shell([*settings, "VLLM_API_KEY=", *command(engine, engine.port or 0, cpu=cpu)]), end="\n\n")
    print("VLLM_API_KEY is another at every start" + ("" if config.engine.port else "; port 0 stands for a free one"))
    plan = vars(arguments) | {"recipe": arguments.config, "device": device, "concurrency": None}
    result, text, _ = _serving(argparse.Namespace(**plan))
    print(text)
    return 0 if result["fits"] else 1


def _shell(words: list[str]) -> str:
    """A line for the shell, without the values of what is named like a secret."""
    shown, hide = [], False
    for word in words:
        name, equals, value = word.partition("=")
        secret = re.search(r"(?:^|[-_])(?:key|token|secret|password)$", name, re.IGNORECASE) is not None
        if hide or (secret and equals):
            shown.append(f"{name}=..." if equals else "...")
        else:
            shown.append(f"{name}={shlex.quote(value)}" if equals and name.isidentifier() else shlex.quote(word))
        hide = secret and not equals
    return " ".join(shown)


def _is_serving(path: Path) -> bool:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load` says what is wrong with it
    return isinstance(data, dict) and "engine" in data


def _training(arguments: Any) -> tuple[dict[str, Any], str, str]:
    from mixfuse.contracts.files import read_json
    from mixfuse.train.planning import training_plan
    from mixfuse.train.recipe import kind_of

    recipe = load(arguments.recipe, kind_of(arguments.recipe, arguments.overrides), arguments.overrides)
    config, where = training_plan.find_config(recipe, arguments.recipe, arguments.model)
    cuda = arguments.device == "cuda"
    host = size(arguments.host_memory) if arguments.host_memory else None
    hardware = training_plan.Hardware(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        # Without a GPU the processes share the host's memory.
        gpu_bytes=size(arguments.gpu_memory) if cuda else (host or sys.maxsize) // arguments.gpus_per_node,
        host_bytes=host,
        reserve_bytes=size(arguments.reserve) if cuda else 0,
        cuda=cuda,
    )
    zero3 = read_json(recipe.deepspeed)
    training_plan.count_on_meta(config)
    made = training_plan.plan(recipe, config, zero3, hardware, source=f"{arguments.recipe} ({where})")
    advice = [] if made.fits else training_plan.advise(recipe, config, zero3, hardware)
    bandwidth = arguments.bandwidth or (50.0 if arguments.nodes > 1 else 450.0)
    assumed = {
        "peak TFLOP/s a GPU": arguments.tflops,
        "utilisation": arguments.utilisation,
        "GB/s received a GPU": bandwidth,
    }
    estimate = None
    if cuda:
        estimate = training_plan.speed(
            made, tflops=arguments.tflops, utilisation=arguments.utilisation, bandwidth=bandwidth * 1e9
        )
    line = f"{training_plan.header(made)}: `{_command(arguments)}`"
    return (
        training_plan.to_json(made, advice, estimate, assumed),
        training_plan.to_text(made, advice, estimate, assumed),
        line,
    )


def _command(arguments: Any) -> str:
    """The command that prints this plan."""
    words = ["mixfuse", "plan", str(arguments.recipe), *arguments.overrides]
    words += ["--nodes", str(arguments.nodes), "--gpus-per-node", str(arguments.gpus_per_node)]
    words += ["--model", str(arguments.model)] if arguments.model else []
    words += ["--device", "cpu"] if arguments.device == "cpu" else ["--gpu-memory", arguments.gpu_memory]
    return shlex.join(words)


def _serving(arguments: Any) -> tuple[dict[str, Any], str, str]:
    from mixfuse.app.server import ServeConfig
    from mixfuse.contracts.files import read_json
    from mixfuse.serve import engine_plan

    engine = load(arguments.recipe, ServeConfig, arguments.overrides).engine
    places = (
        [arguments.model] if arguments.model else [engine.weights or engine.base, arguments.recipe.parent / "model"]
    )
    files = [place if place.is_file() else place / "config.json" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MixfuseError(f"no config.json in {' or '.join(map(str, places))}; name a folder with one: --model DIR")
    config = read_json(file)
    cpu = arguments.device == "cpu"
    hardware = {"gpus": arguments.nodes * arguments.gpus_per_node, "gpu_bytes": size(arguments.gpu_memory)}
    concurrency = arguments.concurrency or 1
    made = engine_plan.plan(engine, config, **hardware, concurrency=concurrency, cpu=cpu)
    advice = [] if made.fits or cpu else engine_plan.advise(engine, config, **hardware, concurrency=concurrency)
    parts = {**made.parts, "kv_cache": made.kv_needed}
    result = {
        "kind": "serving",
        "recipe": str(arguments.recipe),
        "base_parameters": made.parameters,
        "tensor_parallel": made.split.t,
        "pipeline_parallel": made.split.p,
        "per_gpu_bytes": {**parts, "total": made.total},
        "kv_bytes_per_token": made.kv_per_token,
        "kv_room_bytes": made.kv_room,
        "concurrency": made.concurrency,
        "length": made.length,
        "most_at_once": made.most,
        "fits": made.fits,
        "problems": list(made.problems),
        "advice": [change._asdict() for change in advice],
    }
    unit = "process" if cpu else "GPU"
    lines = [
        f"{arguments.recipe} ({file}): TP {made.split.t} x PP {made.split.p}, {made.parameters / 1e9:.2f} B parameters",
        f"per {unit}, with {made.concurrency} x {made.length} tokens in the cache:",
        *(f"  {name:14} {_gib(count):>10}" for name, count in {**parts, "total": made.total}.items()),
        f"room for keys and values: {_gib(max(0, made.kv_room))}, {made.kv_per_token:,} bytes a token: "
        f"{made.most} requests of {made.length} tokens at once",
        "fits" if made.fits else "does NOT fit: " + "; ".join(made.problems),
        *(f"  fits with {change.change}: {_gib(change.gpu_bytes)} a {unit}" for change in advice),
    ]
    line = (
        f"{_gib(sum(made.parts.values()))} a {unit}, {_gib(max(0, made.kv_room))} left for keys and values: "
        f"`{_command(arguments)}`"
    )
    return result, "\n".join(lines), line


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
