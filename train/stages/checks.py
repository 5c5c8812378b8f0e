"""What is checked of a recipe and its data before any process is started."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.family import Shape
from mixfuse.contracts.files import read_json
from mixfuse.contracts.paths import check_output, keep_apart
from mixfuse.train.data.prepared import cache_folder
from mixfuse.train.planning.training_plan import Zero3, check_sequences
from mixfuse.train.processes import worker
from mixfuse.train.quantization import CHANGING_KEYS, QUANTIZATION_BLOCK
from mixfuse.train.recipe import TrainRecipe
from mixfuse.train.stages.trackers import check_trackers


def check_recipe(recipe: TrainRecipe) -> None:
    """Checks what can be checked without loading a model or data.

    Raises:
        MixfuseError: The base or the DeepSpeed config is missing or wrong, the recipe names experts that the base does
            not have or a tracker that is not installed, chats or the batch do not divide among the processes, or the
            output is an input or cannot be written.
    """
    sources = (*recipe.data, *(recipe.evaluation.data or () if recipe.evaluation else ()))
    keep_apart(
        [recipe.out, cache_folder(recipe)],
        [recipe.base, recipe.deepspeed, *(source.path for source in sources if source.path)],
    )
    check_output(recipe.out, folder=True)
    check_output(cache_folder(recipe), folder=True)
    if not (recipe.base / "config.json").is_file():
        raise MixfuseError(
            f"base: {recipe.base} is not a model folder (no config.json); put a model's files there, or "
            f"build the demo's small base with: mixfuse base build {recipe.base}"
        )
    model = read_json(recipe.base / "config.json")
    shape = family_of(recipe.base).shape(model)
    recipe.lora.chosen(shape.L, shape.E)
    check_trackers(recipe)
    check_quantization(recipe, shape, read_zero3(recipe.deepspeed, shape.H))
    world, sequences = worker.world_size(recipe.processes), recipe.parallel.sequences
    check_sequences(sequences, world, shape)
    per_pass = recipe.optimizer.micro_batch * world // sequences
    if recipe.optimizer.batch_size % per_pass:
        raise MixfuseError(
            f"optimizer.batch_size {recipe.optimizer.batch_size} is no multiple of micro_batch * processes"
            f"{' / parallel.sequences' if sequences > 1 else ''} = {per_pass}"
        )


def check_quantization(recipe: TrainRecipe, shape: Shape, zero3: Mapping[str, Any]) -> None:
    """Checks that the experts' codes fit the base and come through ZeRO-3 as they are.

    Raises:
        MixfuseError: A row of a weight is no whole number of blocks, or DeepSpeed would compute with the codes.
    """
    if not recipe.quantization:
        return
    if shape.H % QUANTIZATION_BLOCK or shape.I % QUANTIZATION_BLOCK:
        raise MixfuseError(
            f"quantization: {recipe.quantization} has a scale for each {QUANTIZATION_BLOCK} weights of a row, and the "
            f"base's experts are {shape.H} and {shape.I} wide, no multiples of it; leave quantization out"
        )
    if key := next((key for key in CHANGING_KEYS if zero3["zero_optimization"].get(key)), None):
        raise MixfuseError(
            f"quantization: with {key} in {recipe.deepspeed}, DeepSpeed would change the experts' codes on their way; "
            "set it to false, or leave quantization out; gathers are small with it already"
        )


def read_zero3(path: Path, hidden: int) -> dict[str, Any]:
    """Reads DeepSpeed's JSON.

    Args:
        path: The file.
        hidden: The base's hidden size, which `auto` values depend on.

    Raises:
        MixfuseError: It is missing or no JSON, sets another stage than 3, or holds a value that is none.
    """
    config = read_json(path)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage")
    if stage != 3 or isinstance(stage, bool):
        raise MixfuseError(f"deepspeed: {path} sets ZeRO stage {stage!r}; mixfuse trains with stage 3"[:500])
    if zero.get("zero_quantized_nontrainable_weights"):
        raise MixfuseError(
            f"deepspeed: {path} sets zero_quantized_nontrainable_weights, which DeepSpeed 0.19.8 does for float16 "
            "alone, and not for weights that are frozen after they are partitioned, as LoRA's base is; set "
            "quantization: int8 or nf4 in the recipe instead"
        )
    Zero3.of(config, hidden)
    return dict(config)


def check_template(recipe: TrainRecipe) -> None:
    """Checks that the chat template carries all of a chat and ends the assistant's turns.

    Raises:
        MixfuseError: There is no such template, it leaves out a part of a chat, or a model could not learn to stop.
    """
    from mixfuse.train.data.loss_mask import encode
    from mixfuse.train.model.tokenizer import load_tokenizer

    chat = [{"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": "Yes."}]
    encode(chat, load_tokenizer(recipe.base, recipe.chat_template), "all")
