"""The judge: TRL's DPOTrainer on verdict pairs, LoRA on attention and experts, under ZeRO-3.

The reference is the policy with the adapter disabled. Handing TRL a plain model and a PEFT config, rather than a PEFT
model, is what makes it so: for a PEFT model TRL copies the adapter as the reference (TRL #6043, #6591).
"""

import random
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig

from mixfuse.errors import MixfuseError
from train import attention, experts
from train.checkpoint import last_checkpoint
from train.data import is_held_out, mixed
from train.model import load_base, load_tokenizer, lora_config
from train.pairs import read_pairs
from train.recipe import DataSource, JudgeRecipe, TrainRecipe
from train.run import train_and_save, trainer_arguments
from train.trainer import JudgeTrainer, NamedPairs


def train(recipe: TrainRecipe) -> None:
    """Trains the recipe's judge and leaves its run folder (see `train.run.train_and_save`)."""
    train_and_save(make_trainer(cast(JudgeRecipe, recipe)), recipe, stage="judge")


def make_trainer(recipe: JudgeRecipe) -> JudgeTrainer:
    """Builds the trainer; at step 0 its reference log-probabilities equal the policy's.

    Raises:
        MixfuseError: No pair fits `max_length`, or as `read_pairs` and `load_base`.
    """
    dtype = getattr(torch, recipe.dtype)
    tokenizer = load_tokenizer(recipe.base)
    implementation = attention.choose(recipe.attention, recipe.base, dtype)
    arguments = DPOConfig(
        **trainer_arguments(recipe),
        beta=recipe.beta,
        train_sampling_strategy="sequential",  # in `pairs_datasets`' order, not row by row at random
        router_aux_loss_coef=0.0,  # the loss is DPO's alone: ln 2 where policy and reference are equal
    )
    data = pairs_datasets(recipe, tokenizer)
    model = load_base(recipe.base, dtype, attention=implementation)
    chosen = experts.settle(recipe, model, data.train, tokenizer, resuming=last_checkpoint(recipe.out) is not None)
    set_seed(recipe.seed)
    return JudgeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=NamedPairs(pad_token_id=tokenizer.pad_token_id, max_length=recipe.max_length),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, chosen),
    )


class PairData(NamedTuple):
    """What the judge trains on: TRL's preference data sets, each row with its `id`.

    Attributes:
        train: Shuffled by pair: the two orders of a pair are neighbours.
        evaluation: Held out, or nothing.
    """

    train: Dataset
    evaluation: Dataset | None


def pairs_datasets(recipe: JudgeRecipe, tokenizer: Any) -> PairData:
    """Makes TRL's preference data sets, the two orders of a pair side by side.

    So an even micro batch holds both orders of every pair in it, and a preference for a position earns nothing. A pair
    longer than `max_length` in either order is left out: truncated, it would lose its verdict.

    Raises:
        MixfuseError: No pair fits, or none is left on a side of the split.
    """
    evaluation = recipe.evaluation
    kept = [_fitting(source, recipe, tokenizer) for source in recipe.data]
    held_out: list[_Pair] = []
    if evaluation and evaluation.share is not None:
        share = evaluation.share
        held_out = [pair for pairs in kept for pair in pairs if is_held_out(pair[0]["id"], share)]
        kept = [[pair for pair in pairs if not is_held_out(pair[0]["id"], share)] for pairs in kept]
        if not held_out or not all(kept):
            side = "training" if held_out else "the held-out share"
            raise MixfuseError(f"no pair fell to {side}; change evaluation.share or name evaluation.data")
    for source in (evaluation.data if evaluation else None) or ():
        held_out += _fitting(source, recipe, tokenizer)
    everything = [pair for pairs in kept for pair in pairs]
    weights = [source.weight for source in recipe.data]
    order = list(mixed([len(pairs) for pairs in kept], weights, recipe.order_seed))
    random.Random(recipe.order_seed).shuffle(order)  # noqa: S311 - a reproducible order, not a secret
    train = Dataset.from_list([row for number in order for row in everything[number]])
    if evaluation and evaluation.limit:
        held_out = held_out[: max(1, evaluation.limit // 2)]
    rows = [row for pair in held_out for row in pair]
    return PairData(train, Dataset.from_list(rows) if rows else None)


_Pair = tuple[dict[str, Any], dict[str, Any]]


def _fitting(source: DataSource, recipe: JudgeRecipe, tokenizer: Any) -> list[_Pair]:
    """The pairs of a data set that fit `max_length` in both orders."""
    rows = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected")} for row in read_pairs(source)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    def fits(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=True, return_dict=False)
        return len(ids) <= recipe.max_length

    kept = [pair for pair in pairs if all(map(fits, pair))]
    if not kept:
        raise MixfuseError(f"{source.name}: no pair fits max_length {recipe.max_length}; raise it")
    if left_out := len(pairs) - len(kept):
        print(f"{source.name}: left out {left_out} of {len(pairs)} pairs longer than {recipe.max_length} tokens")
    return kept
