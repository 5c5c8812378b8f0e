"""TensorBoard and MLflow, through transformers' own callbacks: where they write, and whether they are installed."""

import importlib.util
import os

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.recipe import TrainRecipe


def check_trackers(recipe: TrainRecipe) -> None:
    """Checks that the recipe's trackers are installed.

    Raises:
        MixfuseError: One is not.
    """
    for tracker in recipe.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise MixfuseError(
                f"trackers: {tracker} is not installed; pip install 'mixfuse[trackers]', or leave it out"
            )


def place_trackers(recipe: TrainRecipe) -> None:
    """Sets where trackers write, for the callbacks that transformers' trainer makes; what the user set stays.

    A run that is resumed is a new run in MLflow, of the same name: MLflow refuses a parameter that has changed.
    """
    if "tensorboard" in recipe.trackers:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(recipe.out / "tensorboard"))
    if "mlflow" in recipe.trackers:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{recipe.out.resolve() / 'mlflow.db'}")
