"""`mixfuse plan`: whose plan a file asks for, and on what hardware. A room makes it; here it is only asked and printed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from mixfuse.errors import MixfuseError
from mixfuse.recipe import load

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


def _is_serving(path: Path) -> bool:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load` says what is wrong with it
    return isinstance(data, dict) and "engine" in data


def _training(arguments: Any) -> tuple[dict[str, Any], str, str]:
    from mixfuse.files import read_json
    from train import plan
    from train.recipe import JudgeRecipe, SftRecipe, TrainRecipe

    model: type[TrainRecipe] = SftRecipe
    data = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8")) if arguments.recipe.is_file() else None
    if isinstance(data, dict) and ("beta" in data or data.get("role") == "judge"):
        model = JudgeRecipe
    recipe = load(arguments.recipe, model, arguments.overrides)
    config, where = plan.find_config(recipe, arguments.recipe, arguments.model)
    cuda = arguments.device == "cuda"
    hardware = plan.Hardware(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        gpu_bytes=size(arguments.gpu_memory),
        host_bytes=size(arguments.host_memory) if arguments.host_memory else None,
        reserve_bytes=size(arguments.reserve) if cuda else 0,
        cuda=cuda,
    )
    zero3 = read_json(recipe.deepspeed)
    plan.count_on_meta(config)
    made = plan.plan(recipe, config, zero3, hardware, source=f"{arguments.recipe} ({where})")
    advice = [] if made.fits else plan.advise(recipe, config, zero3, hardware)
    bandwidth = arguments.bandwidth or (50.0 if arguments.nodes > 1 else 450.0)
    assumed = {
        "peak TFLOP/s a GPU": arguments.tflops,
        "utilisation": arguments.utilisation,
        "GB/s received a GPU": bandwidth,
    }
    estimate = plan.speed(made, tflops=arguments.tflops, utilisation=arguments.utilisation, bandwidth=bandwidth * 1e9)
    line = plan.header(made, _command(arguments))
    return plan.to_json(made, advice, estimate, assumed), plan.to_text(made, advice, estimate, assumed), line


def _command(arguments: Any) -> str:
    """The command that prints this plan."""
    words = ["mixfuse", "plan", str(arguments.recipe), *arguments.overrides]
    words += ["--nodes", str(arguments.nodes), "--gpus-per-node", str(arguments.gpus_per_node)]
    words += ["--device", "cpu"] if arguments.device == "cpu" else ["--gpu-memory", arguments.gpu_memory]
    return shlex.join(words)


def _serving(arguments: Any) -> tuple[dict[str, Any], str, str]:
    raise NotImplementedError
