"""Which comparisons each step of a judge's training takes; rounds that take only the pairs it still gets wrong."""

import itertools
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, write_json
from mixfuse.train.recipe import JudgeRecipe

FILE = "data/rounds.json"
"""The numbers of the pairs of each round after the first, in a run's folder until the run ends."""


def schedule(
    recipe: JudgeRecipe,
    lengths: Sequence[int],
    steps: int,
    *,
    only: Collection[int] | None = None,
    first_pass: int = 0,
) -> list[int]:
    """The rows that the optimiser steps take, in order.

    Every pass over the data after the first is shuffled again, by pair if both orders are trained. Within a step the
    longest pairs come first, so that a micro batch holds comparisons of similar length; the order within a step does
    not change what it learns.

    Args:
        recipe: The run's recipe; its `optimizer.batch_size`, `orders` and seed count.
        lengths: Tokens of each row's prompt.
        steps: Number of steps.
        only: Numbers of the pairs to take; by default all.
        first_pass: Number of passes before.
    """
    side_by_side = 2 if recipe.orders == "both" else 1
    pairs = [tuple(range(start, start + side_by_side)) for start in range(0, len(lengths), side_by_side)]
    if only is not None:
        pairs = [pair for number, pair in enumerate(pairs) if number in only]
    batch = recipe.optimizer.batch_size
    count = steps * batch
    stream: list[tuple[int, ...]] = []
    for number in itertools.count(first_pass):
        if len(stream) * side_by_side >= count:
            break
        if number:
            random.Random(f"{recipe.order_seed}:{number}").shuffle(pairs)  # noqa: S311 - reproducible, no secret
        stream += pairs
    if batch % side_by_side:  # a step that ends between the orders of a pair
        return [row for pair in stream for row in pair][:count]
    per_step = batch // side_by_side
    chunks = [stream[start : start + per_step] for start in range(0, count // side_by_side, per_step)]
    return [row for chunk in chunks for pair in sorted(chunk, key=lambda pair: -lengths[pair[0]]) for row in pair]


class Rounds(TrainerCallback):
    """Trains in rounds: each after the first takes the pairs that the judge gets wrong or flips when the round begins.

    It is also the trainer's data set: the rows in the order of the steps. The trainer reads one micro batch ahead, so
    the first micro batch of a round still belongs to the round before.

    Args:
        trainer: A judge's trainer on verdict pairs, whose reference knows every row.
        recipe: The run's recipe.
        rows: The tokenised comparisons, the two orders of a pair side by side.
        lengths: Tokens of each row's prompt.
        steps: The run's optimiser steps.
    """

    def __init__(self, trainer: Any, recipe: JudgeRecipe, rows: Any, lengths: Sequence[int], steps: int) -> None:
        self._trainer, self._recipe, self._rows, self._lengths = trainer, recipe, rows, lengths
        self._order = schedule(recipe, lengths, steps)
        self._all_steps, self._steps = steps, -(-steps // recipe.rounds)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Any:
        return self._rows[self._order[place]]

    @property
    def _path(self) -> Path:
        return self._recipe.out / FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restores the rounds that a resumed run has begun.

        Raises:
            MixfuseError: They are not in the run's folder.
        """
        begun = [step for step in range(self._steps, state.max_steps, self._steps) if step <= state.global_step]
        stored = read_json(self._path) if begun and self._path.is_file() else {}
        for step in begun:
            if str(step) not in stored:
                raise MixfuseError(f"{self._path} lacks the round from step {step}; remove the run to start over")
            self._begin(step, stored[str(step)])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begins the next round at the last step of a round. Every process takes part."""
        step = state.global_step
        if step % self._steps or step >= state.max_steps:
            return
        log_odds = self._trainer.log_odds(self._rows)
        pairs = list(zip(log_odds[::2], log_odds[1::2], strict=True))
        wrong = [number for number, pair in enumerate(pairs) if min(pair) <= 0]
        self._trainer.print_once(f"step {step}: {len(wrong)} of {len(pairs)} pairs are judged wrong, or flip")
        self._trainer.record("wrong_pairs", len(wrong))
        self._begin(step, wrong)
        if state.is_world_process_zero:
            stored = read_json(self._path) if self._path.is_file() else {}
            write_json(self._path, {**stored, str(step): wrong})

    def _begin(self, step: int, pairs: Sequence[int]) -> None:
        """Sets the rows of the steps after `step`; all pairs, if `pairs` is empty."""
        optimizer = self._recipe.optimizer
        order = schedule(
            self._recipe,
            self._lengths,
            self._all_steps - step,
            only=set(pairs) if pairs else None,
            first_pass=step // self._steps,
        )
        ahead = optimizer.micro_batch * self._trainer.args.world_size
        self._order[step * optimizer.batch_size + ahead :] = order[ahead:]
