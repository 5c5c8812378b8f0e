"""Supervised fine-tuning of the domain model: TRL's SFTTrainer, LoRA on attention and experts, under ZeRO-3."""

from typing import cast

import torch
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from train import experts
from train.data import chats_dataset
from train.model import load_base, load_tokenizer, lora_config
from train.recipe import SftRecipe, TrainRecipe
from train.run import last_checkpoint, train_and_save, trainer_arguments


def train(recipe: TrainRecipe) -> None:
    """Trains the recipe's adapter and leaves its run folder (see `train.run.train_and_save`)."""
    recipe = cast(SftRecipe, recipe)
    tokenizer = load_tokenizer(recipe.base)
    data = chats_dataset(recipe.data, tokenizer, recipe.max_length)
    arguments = SFTConfig(
        **trainer_arguments(recipe),
        completion_only_loss=True,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
    )
    model = load_base(recipe.base, getattr(torch, recipe.dtype))
    chosen = experts.settle(recipe, model, data, tokenizer, resuming=last_checkpoint(recipe.out) is not None)
    set_seed(recipe.seed)  # the adapter's start depends on the seed alone, not on what loading drew before
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, chosen),
    )
    train_and_save(trainer, recipe, stage="sft")
