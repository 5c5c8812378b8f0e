"""The probes that a run leaves: what its processes say of fixed prompts, under the adapter that they trained.

They are written in the training's own number format, with the base as it stood in these processes, so that every
adapter of a run has probes, however large its base.
"""

from pathlib import Path
from typing import Any

import torch

from mixfuse.contracts.adapter import PARITY_TOLERANCE, PROBES, Probes
from mixfuse.contracts.agreement import LENGTHS, Answers
from mixfuse.contracts.files import write_text
from mixfuse.train.adapters.parity import as_prompt, comparisons, probe_prompts, stored_probes, verdict_probes
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import JudgeRecipe, TrainRecipe


def run_probes(trainer: Any, recipe: TrainRecipe) -> Probes:
    """Computes the probes. Every process takes part, and each returns the same.

    Prompts are no longer than the recipe's `max_length`, and than 512 tokens, so that their logits fit where the run's
    own did.

    Args:
        trainer: The trainer; its model is as it is to be saved.
        recipe: The run's recipe; a judge's verdicts are probed as well.
    """
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    prompts = probe_prompts(tokenizer, min(recipe.max_length, LENGTHS[1]))
    chats = comparisons() if isinstance(recipe, JudgeRecipe) else []
    asked = [as_prompt(tokenizer, messages) for messages in chats]
    wrapped = trainer.model_wrapped
    adapter = trainer.model
    while not hasattr(adapter, "peft_config"):
        adapter = adapter.module
    was_training = wrapped.training
    wrapped.eval()
    try:
        adapted = [_logprobs(wrapped, prompt, trainer.args.device) for prompt in prompts]
        last = [_logits(wrapped, prompt, trainer.args.device)[-1].cpu() for prompt in asked]
        with adapter.disable_adapter():
            base = [_logprobs(wrapped, prompt, trainer.args.device) for prompt in prompts]
    finally:
        wrapped.train(was_training)
    return Probes(
        tolerance=PARITY_TOLERANCE,
        precision=recipe.dtype,
        logprobs=stored_probes(prompts, Answers(adapted, base)),
        verdicts=list(verdict_probes(chats, last, tokenizer)),
    )


def write_probes(probes: Probes, folder: Path) -> None:
    """Writes the probes beside an adapter of the run, where `adapter export` finds them."""
    write_text(folder / PROBES, probes.model_dump_json() + "\n")


@torch.no_grad()
def _logits(model: Any, prompt: list[int], device: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0]
    return logits.float()


def _logprobs(model: Any, prompt: list[int], device: Any) -> list[float]:
    scores = _logits(model, prompt, device)[:-1].log_softmax(-1)
    return [float(value) for value in scores.gather(-1, torch.tensor(prompt[1:], device=device)[:, None])[:, 0]]
