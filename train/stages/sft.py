"""Supervised fine-tuning of the domain model: TRL's SFTTrainer, LoRA on attention and experts, under ZeRO-3."""

from typing import cast

import torch
from transformers import set_seed
from trl import SFTConfig

from mixfuse.contracts.families import family_of
from mixfuse.train.data.chat_data import chat_data
from mixfuse.train.data.packing import Collator, Share
from mixfuse.train.data.prepared import Prepared
from mixfuse.train.model import attention, choose_experts
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.model.sequence_parallel import divide_attention
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.processes.checkpoint import last_checkpoint
from mixfuse.train.recipe import SftRecipe, TrainRecipe
from mixfuse.train.stages.core import train_and_save, trainer_arguments
from mixfuse.train.stages.trainers import SftTrainer


def train(recipe: TrainRecipe, prepared: Prepared | None = None) -> None:
    """Trains the recipe's adapter and leaves its run folder (see `train/stages/core.py: train_and_save`).

    Args:
        recipe: The run's recipe.
        prepared: Its data, by default prepared here.
    """
    recipe = cast(SftRecipe, recipe)
    dtype = getattr(torch, recipe.dtype)
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    sequences = recipe.parallel.sequences
    implementation = attention.choose_implementation(
        recipe.attention, recipe.base, dtype, packing=recipe.packing, sequences=sequences
    )
    resuming = last_checkpoint(recipe.out) is not None
    data = chat_data(recipe, tokenizer, prepared)
    arguments = SFTConfig(
        **trainer_arguments(recipe, recipe.optimizer.steps_over(len(data.train))),
        dataset_kwargs={"skip_prepare_dataset": True},  # `chat_data` has prepared it
        completion_only_loss=False,  # the labels mark where the loss is
        router_aux_loss_coef=recipe.router_aux_loss_coef,
    )
    model = load_base(recipe.base, dtype, attention=implementation, quantization=recipe.quantization)
    chosen = choose_experts.choose_for_run(recipe, model, data.table, tokenizer, resuming=resuming)
    set_seed(recipe.seed)  # the adapter's initial values depend on the seed alone, not on what loading drew
    share = Share(torch.distributed.get_rank() % sequences, sequences)
    trainer = SftTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=Collator(tokenizer.pad_token_id, packed=recipe.packing, share=share),
        processing_class=tokenizer,
        peft_config=lora_config(family_of(recipe.base), recipe.lora, chosen),
    )
    if sequences > 1:
        trainer.divide_rows(divide_attention(model, sequences))
    train_and_save(trainer, recipe, stage="sft", examples=data.chats)
