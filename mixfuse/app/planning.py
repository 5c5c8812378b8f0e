"""Plans a training recipe or a serve config and prints the plan: `mixfuse plan` and `mixfuse serve --dry-run`."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import load, read_mapping

if TYPE_CHECKING:
    from mixfuse.serve.engine import EngineConfig
    from mixfuse.serve.engine_plan import Change, ServePlan

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 1 << 60
_TRAINING_ONLY = ("reserve", "tflops", "utilisation", "bandwidth", "memory_bandwidth")
_TFLOPS, _TRAINING_UTILISATION = 989.0, 0.3
_MEMORY_BANDWIDTH = 2000.0  # of an H100's 3 350 GB/s, for kernels that copy and scale


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


def size(option: str, text: str, *, zero: bool = False) -> int:
    """Parses `80GiB`, `80GB` or a number of bytes.

    Args:
        option: Whose value it is, for the message.
        text: The value.
        zero: Whether the size may be 0.

    Returns:
        The size in bytes.

    Raises:
        MixfuseError: The text is not a size, or a bare number that can only have been meant in another unit.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?)(b?)", text.strip().lower(), re.ASCII)
    if not match or match[2] not in _UNITS or match[2] == "i":
        raise MixfuseError(f"{option} {text[:40]!r} is not a size; write 80GiB, 80GB or a number of bytes")
    count = int(float(match[1]) * _UNITS[match[2]])
    if 0 < count < _LEAST_BYTES and not match[2]:
        raise MixfuseError(f"{option} {text[:40]!r} counts bytes; write the unit: {match[1]}GiB or {match[1]}GB")
    if count > _MOST_BYTES or (count == 0 and not zero):
        raise MixfuseError(f"{option} {text[:40]!r} is no size that a memory has; write 80GiB, 80GB or so")
    return count


def print_plan(arguments: Any) -> int:
    """Plans a training recipe or a serve config and prints the plan; with `--json` its last line is JSON.

    Args:
        arguments: The options of `mixfuse plan`.

    Returns:
        0 if the plan fits, 1 if it does not.

    Raises:
        MixfuseError: The file, an override, a size or the base's config is invalid, or an option concerns only the
            other kind of file.
    """
    serving = _is_serve_config(arguments.recipe)
    _refuse_unheeded(arguments, serving=serving)
    try:
        report = _plan_serving(arguments) if serving else _plan_training(arguments)
    except OverflowError:
        raise MixfuseError(f"{arguments.recipe}: a number in it is too large to plan with") from None
    print(report.header if arguments.header else report.text)
    if arguments.json:
        print(json.dumps(report.data))
    return 0 if report.data["fits"] else 1


def _refuse_unheeded(arguments: Any, *, serving: bool) -> None:
    """Refuses options that would change nothing.

    Raises:
        MixfuseError: One was given.
    """
    what = "a serve config" if serving else "a training recipe"
    unheeded = _TRAINING_ONLY if serving else ("concurrency",)
    if arguments.device == "cpu":
        what, unheeded = f"{what} on a CPU", (*unheeded, *_TRAINING_ONLY)
    for name in unheeded:
        if getattr(arguments, name) is not None:
            raise MixfuseError(f"--{name.replace('_', '-')} changes nothing in the plan of {what}; leave it out")


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
    from mixfuse.serve.vllm_key import KEY_FILE

    config, _ = configs(arguments.config, arguments.overrides)
    if others := config.engine.external:
        print(f"{arguments.config}: the engine runs elsewhere ({', '.join(others)}); nothing would be started")
        return 0
    device = arguments.device or ("cpu" if cpu_build() else "cuda")
    cpu = device == "cpu"
    for engine in per_replica(_with_named_parser(config.engine, arguments), cpu=cpu):
        settings = [f"{name}={value}" for name, value in environment(engine, cpu=cpu).items()]
        print(_shell([*settings, f"{KEY_FILE}=FILE", *command(engine, engine.port or 0, cpu=cpu)]), end="\n\n")
    free = "" if config.engine.port else "; port 0 stands for a free port"
    print(f"{KEY_FILE} names a file with a key that is new at every start{free}")
    options = vars(arguments) | {"recipe": arguments.config, "device": device, "concurrency": None, "host_memory": None}
    try:
        report = _plan_serving(argparse.Namespace(**options))
    except OverflowError:
        raise MixfuseError(f"{arguments.config}: a number in it is too large to plan with") from None
    print(report.text)
    return 0 if report.data["fits"] else 1


def _with_named_parser(engine: "EngineConfig", arguments: Any) -> "EngineConfig":
    """The engine with the name of its family's parser of tool calls, which needs no base on this disk."""
    from mixfuse.contracts.families import family_named
    from mixfuse.contracts.files import read_json
    from mixfuse.serve.engine import FAMILY_TOOLS

    if engine.tool_parser != FAMILY_TOOLS:
        return engine
    config = read_json(_find_config(None, engine.base, arguments.config.parent / "model"))
    named = family_named(config.get("model_type") if isinstance(config, dict) else None).tool_parser
    return engine.model_copy(update={"tool_parser": named})


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
        return "engine" in read_mapping(path)
    except MixfuseError:
        return False  # `load` reports the error


def _plan_training(arguments: Any) -> PlanReport:
    from mixfuse.contracts.families import shape_of
    from mixfuse.train.planning import training_plan
    from mixfuse.train.recipe import kind_of
    from mixfuse.train.stages.checks import check_quantization, read_zero3

    recipe = load(arguments.recipe, kind_of(arguments.recipe, arguments.overrides), arguments.overrides)
    config, config_path = training_plan.find_config(recipe, arguments.recipe, arguments.model)
    cuda = arguments.device == "cuda"
    host = size("--host-memory", arguments.host_memory) if arguments.host_memory is not None else None
    hardware = training_plan.Hardware(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        # Without a GPU, the processes share the host's memory.
        gpu_bytes=size("--gpu-memory", arguments.gpu_memory)
        if cuda
        else (host or sys.maxsize) // arguments.gpus_per_node,
        host_bytes=host,
        reserve_bytes=_reserve(arguments.reserve, training_plan.RESERVE) if cuda else 0,
        cuda=cuda,
    )
    zero3 = read_zero3(recipe.deepspeed, shape_of(config).H)
    check_quantization(recipe, shape_of(config), zero3)
    if arguments.memory_bandwidth is not None and not recipe.quantization:
        raise MixfuseError(
            "--memory-bandwidth changes nothing in the plan of a recipe without quantization; leave it out"
        )
    training_plan.count_on_meta(config)
    plan = training_plan.plan(recipe, config, zero3, hardware, source=f"{arguments.recipe} ({config_path})")
    advice = [] if plan.fits else training_plan.advise(recipe, config, zero3, hardware)
    bandwidth = arguments.bandwidth or (50.0 if arguments.nodes > 1 else 450.0)
    tflops = _TFLOPS if arguments.tflops is None else arguments.tflops
    utilisation = _TRAINING_UTILISATION if arguments.utilisation is None else arguments.utilisation
    assumed = {
        "peak TFLOP/s a GPU": tflops,
        "utilisation": utilisation,
        "GB/s received a GPU": bandwidth,
    }
    memory_bandwidth = arguments.memory_bandwidth or _MEMORY_BANDWIDTH
    if recipe.quantization:
        assumed["GB/s of a GPU's memory"] = memory_bandwidth
    estimate = None
    if cuda:
        estimate = training_plan.speed(
            plan,
            tflops=tflops,
            utilisation=utilisation,
            bandwidth=bandwidth * 1e9,
            memory_bandwidth=memory_bandwidth * 1e9,
        )
    return PlanReport(
        training_plan.to_json(plan, advice, estimate, assumed),
        training_plan.to_text(plan, advice, estimate, assumed),
        f"{training_plan.header(plan)}: `{_command(arguments)}`",
    )


def _reserve(text: str | None, usual: int) -> int:
    return usual if text is None else size("--reserve", text, zero=True)


def _command(arguments: Any) -> str:
    """Returns the command that prints this plan."""
    words = ["mixfuse", "plan", str(arguments.recipe), *arguments.overrides]
    words += ["--nodes", str(arguments.nodes), "--gpus-per-node", str(arguments.gpus_per_node)]
    words += ["--model", str(arguments.model)] if arguments.model else []
    cpu = arguments.device == "cpu"
    words += ["--device", "cpu"] if cpu else ["--gpu-memory", arguments.gpu_memory]
    words += ["--host-memory", arguments.host_memory] if arguments.host_memory else []
    return shlex.join(words)


def _plan_serving(arguments: Any) -> PlanReport:
    from mixfuse.app.server import ServeConfig
    from mixfuse.contracts.files import read_json
    from mixfuse.serve import engine_plan

    engine = load(arguments.recipe, ServeConfig, arguments.overrides).sized_engine
    file = _find_config(arguments.model, engine.weights or engine.base, arguments.recipe.parent / "model")
    config = read_json(file)
    cpu = arguments.device == "cpu"
    gpu_bytes = size("--gpu-memory", arguments.gpu_memory)
    hardware = {"gpus": arguments.nodes * arguments.gpus_per_node, "gpu_bytes": gpu_bytes}
    concurrency = arguments.concurrency or 1
    memory = size("--host-memory", arguments.host_memory) if arguments.host_memory is not None else None
    host = (memory, arguments.gpus_per_node)
    plan = engine_plan.plan(engine, config, **hardware, concurrency=concurrency, cpu=cpu, host=host)
    advice = [] if plan.fits or cpu else engine_plan.advise(engine, config, **hardware, concurrency=concurrency)
    header = (
        f"{_gib(sum(plan.parts.values()))} a {'process' if cpu else 'GPU'}, "
        f"{_gib(max(0, plan.kv_room))} left for keys and values: `{_command(arguments)}`"
    )
    text = _serving_text(plan, advice, f"{arguments.recipe} ({file})", "process" if cpu else "GPU")
    if cpu and memory is None:
        text += "\n  (--host-memory was not given, so a host's is not checked)"
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
        "data_parallel": plan.split.d,
        "per_gpu_bytes": {**plan.parts, "kv_cache": plan.kv_needed, "total": plan.total},
        "per_host_bytes": {"pinned_adapters": plan.pinned},
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
        f"{source}: {plan.split}, {plan.parameters / 1e9:.2f} B parameters",
        f"per {unit}, with {plan.concurrency} x {plan.length} tokens in the cache:",
        *(f"  {name:14} {_gib(count):>10}" for name, count in parts.items()),
        f"room for keys and values: {_gib(max(0, plan.kv_room))}, {plan.kv_per_token:,} bytes a token: "
        f"{plan.most} requests of {plan.length} tokens at once",
        *([f"per host: {_gib(plan.pinned)} of pinned memory for cached adapters"] if plan.pinned else []),
        "fits" if plan.fits else "does NOT fit: " + "; ".join(plan.problems),
        *(f"  fits with {change.change}: {_gib(change.gpu_bytes)} a {unit}" for change in advice),
    ]
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
