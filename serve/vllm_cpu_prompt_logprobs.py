"""A part of our vLLM plugin for the CPU: the log-probabilities of a prompt, which every swap asks for, in pieces.

vLLM's runner on a CPU (`_get_prompt_logprobs_dict` in vllm/v1/worker/gpu_model_runner.py) makes the logits of all
tokens that a prompt has in a step at once, their log-softmax, and their comparison as 64-bit integers: 17 bytes for
each token and word of the vocabulary, 0.85 GB for 1014 tokens of 49 152 words. Linux clears these pages anew for each
prompt, which takes longer than the products, while every other request waits. On GPUs vLLM's newer runner has its own
pieces.
"""

from typing import Any

import torch

ROWS = 64
"""Tokens of a piece. Fewer would read the output layer's weights too often."""
_METHOD = "_get_prompt_logprobs_dict"


def register() -> None:
    """Makes vLLM's runner for CPUs compute in pieces.

    Raises:
        AttributeError: This vLLM has no such method.
    """
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    whole = getattr(CPUModelRunner, _METHOD)
    _ = Sampler.compute_logprobs, Sampler.gather_logprobs

    def in_pieces(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model_config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):  # asks for logits
            return whole(self, *args, **kwargs)
        return whole(_InPieces(self), *args, **kwargs)

    setattr(CPUModelRunner, _METHOD, in_pieces)


class _InPieces:
    """A runner, its model and its sampler in one, as that method sees them.

    What the method takes for logits, and then for log-probabilities, are hidden states still. They become the one and
    the other where tokens are gathered from them, a piece at a time.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.model = self.sampler = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @staticmethod
    def compute_logits(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    @staticmethod
    def compute_logprobs(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def gather_logprobs(self, hidden_states: torch.Tensor, count: int, tokens: torch.Tensor) -> Any:
        """As vLLM's sampler does.

        Args:
            hidden_states: [tokens, hidden].
            count: How many of the likeliest words to return for each token.
            tokens: [tokens], the ids that follow.
        """
        model, sampler = self._runner.model, self._runner.sampler
        pieces = [
            sampler.gather_logprobs(sampler.compute_logprobs(model.compute_logits(states)), count, ids)
            for states, ids in zip(hidden_states.split(ROWS), tokens.split(ROWS), strict=True)
        ]
        return type(pieces[0]).cat(pieces)
