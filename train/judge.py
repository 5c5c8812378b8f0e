"""The judge: TRL's DPOTrainer on verdict pairs, LoRA on attention and experts, under ZeRO-3.

The reference is the policy with the adapter disabled. Handing TRL a plain model and a PEFT config, rather than a PEFT
model, is what makes it so: for a PEFT model TRL copies the adapter as the reference (TRL #6043, #6591).
"""

import random
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from mixfuse.errors import MixfuseError
from train import experts
from train.model import load_base, load_tokenizer, lora_config
from train.pairs import read_pairs
from train.recipe import JudgeRecipe, TrainRecipe
from train.run import last_checkpoint, train_and_save, trainer_arguments


def train(recipe: TrainRecipe) -> None:
    """Trains the recipe's judge and leaves its run folder (see `train.run.train_and_save`)."""
    train_and_save(make_trainer(cast(JudgeRecipe, recipe)), recipe, stage="judge")


def make_trainer(recipe: JudgeRecipe) -> DPOTrainer:
    """Builds the trainer; at step 0 its reference log-probabilities equal the policy's.

    Raises:
        MixfuseError: No pair fits `max_length`, or as `read_pairs` and `load_base`.
    """
    tokenizer = load_tokenizer(recipe.base)
    arguments = DPOConfig(
        **trainer_arguments(recipe),
        beta=recipe.beta,
        train_sampling_strategy="sequential",  # in `pairs_dataset`'s order, not row by row at random
        router_aux_loss_coef=0.0,  # the loss is DPO's alone: ln 2 where policy and reference are equal
    )
    data = pairs_dataset(recipe, tokenizer)
    model = load_base(recipe.base, getattr(torch, recipe.dtype))
    chosen = experts.settle(recipe, model, data, tokenizer, resuming=last_checkpoint(recipe.out) is not None)
    set_seed(recipe.seed)
    return DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, chosen),
    )


def pairs_dataset(recipe: JudgeRecipe, tokenizer: Any) -> Dataset:
    """Makes TRL's preference data set, shuffled by pair: the two orders of a pair stay neighbours.

    So an even micro batch holds both orders of every pair in it, and a preference for a position earns nothing. A pair
    longer than `max_length` in either order is left out: truncated, it would lose its verdict.

    Raises:
        MixfuseError: No pair fits.
    """
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in read_pairs(recipe.data)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    def fits(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=True, return_dict=False)
        return len(ids) <= recipe.max_length

    kept = [pair for pair in pairs if all(map(fits, pair))]
    if not kept:
        raise MixfuseError(f"{recipe.data}: no pair fits max_length {recipe.max_length}; raise it")
    if left_out := len(pairs) - len(kept):
        print(f"{recipe.data}: left out {left_out} of {len(pairs)} pairs longer than {recipe.max_length} tokens")
    random.Random(recipe.seed).shuffle(kept)  # noqa: S311 - a reproducible order, not a secret
    return Dataset.from_list([row for pair in kept for row in pair])
