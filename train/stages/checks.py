"""What is checked of a recipe and its data before any process is started."""

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import read_json
from mixfuse.train.processes import worker
from mixfuse.train.recipe import SftRecipe, TrainRecipe


def check_recipe(recipe: TrainRecipe) -> None:
    """Checks what can be checked without loading a model or data.

    Raises:
        MixfuseError: The base or the DeepSpeed config is missing or wrong, the recipe names experts that the base does
            not have, or the batch does not divide among the processes.
    """
    if not (recipe.base / "config.json").is_file():
        raise MixfuseError(
            f"base: {recipe.base} is not a model folder (no config.json); build one with: "
            f"mixfuse base build {recipe.base}"
        )
    model = read_json(recipe.base / "config.json")
    shape = family_of(recipe.base).shape(model)
    recipe.lora.chosen(shape.L, shape.E)
    config = read_json(recipe.deepspeed)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        raise MixfuseError(f"deepspeed: {recipe.deepspeed} sets ZeRO stage {stage!r}; mixfuse trains with stage 3")
    per_pass = recipe.optimizer.micro_batch * worker.world_size(recipe.processes)
    if recipe.optimizer.batch_size % per_pass:
        raise MixfuseError(
            f"optimizer.batch_size {recipe.optimizer.batch_size} is no multiple of micro_batch * processes = {per_pass}"
        )


def check_data(recipe: TrainRecipe) -> None:
    """Reads all training and evaluation data once and keeps none of it.

    Raises:
        MixfuseError: A data set is missing, or a row is malformed.
    """
    from mixfuse.train.data.chats import check_chats
    from mixfuse.train.data.pairs import check_pairs

    check = check_chats if isinstance(recipe, SftRecipe) else check_pairs
    check(recipe.data)
    if recipe.evaluation and recipe.evaluation.data:
        check(recipe.evaluation.data)
