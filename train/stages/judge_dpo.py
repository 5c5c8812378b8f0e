"""The judge: TRL's DPOTrainer on verdict pairs, LoRA on attention and experts, under ZeRO-3.

The reference is the policy with the adapter disabled. That holds only if TRL gets a plain model and a PEFT config: for
a PEFT model TRL copies the adapter as the reference (TRL #6043, #6591).
"""

from typing import Any, cast

import torch
from transformers import set_seed
from trl import DPOConfig

from mixfuse.contracts.adapter import fingerprint
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_of
from mixfuse.contracts.files import sha256_json
from mixfuse.train.data.pair_data import pairs_datasets
from mixfuse.train.data.prepared import Prepared
from mixfuse.train.data.schedule import Rounds, schedule
from mixfuse.train.model import attention, choose_experts
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.processes.checkpoint import last_checkpoint
from mixfuse.train.recipe import JudgeRecipe, TrainRecipe
from mixfuse.train.stages.core import train_and_save, trainer_arguments
from mixfuse.train.stages.one_pass_dpo import Reference
from mixfuse.train.stages.trainers import JudgeTrainer, NamedPairs, Verdicts, verdict_rows

REFERENCE = "data/reference.json"
"""The reference's log-probabilities, in a run's folder until the run ends."""


def train(recipe: TrainRecipe, prepared: Prepared | None = None) -> None:
    """Trains the recipe's judge and leaves its run folder (see `train/stages/core.py: train_and_save`).

    Args:
        recipe: The run's recipe.
        prepared: Its data, by default prepared here.
    """
    trainer = make_trainer(cast(JudgeRecipe, recipe), prepared)
    train_and_save(trainer, recipe, stage="judge", examples=trainer.examples)


def make_trainer(recipe: JudgeRecipe, prepared: Prepared | None = None) -> JudgeTrainer:
    """Builds the trainer; at step 0 its reference log-probabilities equal the policy's.

    Raises:
        MixfuseError: No pair fits `max_length`, the completions are not what the recipe says, or the data or the base
            cannot be read.
    """
    dtype = getattr(torch, recipe.dtype)
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    implementation = attention.choose_implementation(recipe.attention, recipe.base, dtype)
    weights = {recipe.loss: 1.0} | ({"sft": recipe.sft_weight} if recipe.sft_weight else {})
    data = pairs_datasets(recipe, tokenizer, prepared)
    steps = _steps(recipe, len(data.train))
    arguments = DPOConfig(
        **trainer_arguments(recipe, steps),
        loss_type=list(weights),
        loss_weights=list(weights.values()),
        beta=recipe.beta,
        train_sampling_strategy="sequential",  # in the order of `schedule`, not row by row at random
        router_aux_loss_coef=0.0,  # the loss is DPO's alone: ln 2 where policy and reference are equal
    )
    model = load_base(recipe.base, dtype, attention=implementation, quantization=recipe.quantization)
    resuming = last_checkpoint(recipe.out) is not None
    chosen = choose_experts.choose_for_run(recipe, model, data.train, tokenizer, resuming=resuming)
    set_seed(recipe.seed)
    one_token = recipe.completion == "verdict"
    trainer = JudgeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=NamedPairs(pad_token_id=tokenizer.pad_token_id, max_length=recipe.max_length, verdicts=one_token),
        processing_class=tokenizer,
        peft_config=lora_config(family_of(recipe.base), recipe.lora, chosen),
    )
    tokenised: Any = trainer.train_dataset
    lengths = tokenised["length"][:]
    trainer.examples = len(lengths)
    if recipe.rounds > 1:
        rounds = Rounds(trainer, recipe, tokenised, lengths, steps)
        trainer.train_dataset = rounds
        trainer.add_callback(rounds)
    else:
        trainer.train_dataset = tokenised = tokenised.select(schedule(recipe, lengths, steps))
    if one_token:
        trainer.read_verdicts(verdicts_of(recipe, tokenised))
    return trainer


def _steps(recipe: JudgeRecipe, comparisons: int) -> int:
    """The run's optimiser steps.

    Raises:
        MixfuseError: They are fewer than the warm start or the rounds need.
    """
    steps = recipe.optimizer.steps_over(comparisons)
    try:
        recipe.check_steps(steps)
    except ValueError as error:
        raise MixfuseError(f"{error}; {comparisons} comparisons make {steps} steps in optimizer.epochs") from None
    return steps


def verdicts_of(recipe: JudgeRecipe, dataset: Any) -> Verdicts:
    """Collects what training on verdict pairs needs.

    Args:
        recipe: The run's recipe.
        dataset: Every comparison that may be trained on, tokenised.

    Raises:
        MixfuseError: A pair's completions begin with the same token, so the verdict does not come first.
    """
    rows = verdict_rows(dataset)
    if any(row.chosen == row.rejected for row in rows):
        raise MixfuseError("a pair's completions begin with the same token; set completion: rationale for such pairs")
    margins = dataset["margin"] if recipe.margin else []
    # Rewards are β (policy - reference), so an offset δ of the reward is δ / β in the reference's log-probability.
    offsets = {row.key: recipe.margin * margin / recipe.beta for row, margin in zip(rows, margins, strict=False)}
    run_file = recipe.out / REFERENCE
    # After a warm start the reference is this run's own policy, so no other run can share its file.
    path = run_file if recipe.warm_start or recipe.reference_cache is None else recipe.reference_cache
    identity = sha256_json(
        [fingerprint(recipe.base).model_dump(), recipe.dtype, *([recipe.quantization] * bool(recipe.quantization))]
    )
    return Verdicts(
        rows, Reference(path, identity), recipe.warm_start, offsets, recipe.consistency, recipe.reference_batch
    )
