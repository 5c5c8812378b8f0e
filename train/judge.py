"""The judge: TRL's DPOTrainer on verdict pairs, LoRA on attention and experts, under ZeRO-3.

The reference is the policy with the adapter disabled. Handing TRL a plain model and a PEFT config, rather than a PEFT
model, is what makes it so: for a PEFT model TRL copies the adapter as the reference (TRL #6043, #6591).
"""

from typing import cast

import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from train.model import load_base, load_tokenizer, lora_config
from train.pairs import read_pairs
from train.recipe import JudgeRecipe, TrainRecipe
from train.run import train_and_save, trainer_arguments


def train(recipe: TrainRecipe) -> None:
    """Trains the recipe's judge and leaves its run folder (see `train.run.train_and_save`)."""
    recipe = cast(JudgeRecipe, recipe)
    trainer = make_trainer(recipe)
    train_and_save(trainer, recipe, stage="judge", data=trainer.train_dataset)


def make_trainer(recipe: JudgeRecipe) -> DPOTrainer:
    """Builds the trainer; at step 0 its reference log-probabilities equal the policy's."""
    tokenizer = load_tokenizer(recipe.base)
    pairs = read_pairs(recipe.data)
    data = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])
    arguments = DPOConfig(**trainer_arguments(recipe), beta=recipe.beta)
    model = load_base(recipe.base, getattr(torch, recipe.dtype))
    set_seed(recipe.seed)
    return DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora),
    )
