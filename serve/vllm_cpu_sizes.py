"""A part of our vLLM plugin for the CPU: what depends on the number of tokens in a step, which is seldom the same.

- **Matrix products.** oneDNN compiles a kernel for each number of rows, in about a millisecond, and keeps 1024 of them,
  of 0.28 MiB each. Experts get any number of rows, so most products of a long prompt compiled one, and the engine grew
  until the cache was full. Rows are padded here, so that there are few numbers (`padded_rows`).
- **The log-probabilities of prompts**, which every swap asks for. vLLM's runner on a CPU (`_get_prompt_logprobs_dict`
  in vllm/v1/worker/gpu_model_runner.py) makes the logits of all tokens that a prompt has in a step at once, their
  log-softmax, and their comparison as 64-bit integers: 17 bytes for each token and word of the vocabulary, 0.85 GB for
  1014 tokens of 49 152 words. Linux clears these pages anew for each prompt, which takes longer than the products,
  while every other request waits. Here they are made in pieces. On GPUs vLLM's newer runner has pieces of its own.
"""

from typing import Any

import torch

ROWS = 64
"""Tokens of a piece. Fewer would read the output layer's weights too often."""
_METHOD = "_get_prompt_logprobs_dict"


def register() -> None:
    """Replaces both.

    Raises:
        AttributeError: This vLLM has not what is replaced.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    multiply = ops.onednn_mm
    whole = getattr(CPUModelRunner, _METHOD)
    _ = Sampler.compute_logprobs, Sampler.gather_logprobs

    def onednn_mm(dnnl_handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        padded = padded_rows(len(rows))
        if padded == len(rows):
            return multiply(dnnl_handler, x, bias)
        filled = rows.new_zeros(padded, rows.shape[1])
        filled[: len(rows)] = rows
        product: torch.Tensor = multiply(dnnl_handler, filled, bias)[: len(rows)]
        return product.view(*x.shape[:-1], product.shape[1])

    def in_pieces(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model_config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):  # asks for logits
            return whole(self, *args, **kwargs)
        return whole(_InPieces(self), *args, **kwargs)

    ops.onednn_mm = onednn_mm
    setattr(CPUModelRunner, _METHOD, in_pieces)


def padded_rows(rows: int) -> int:
    """The next power of two, or multiple of 64: at most 7 numbers up to 64, and 16 for each 1024 rows beyond."""
    return 1 << (rows - 1).bit_length() if 0 < rows <= ROWS else -(-rows // ROWS) * ROWS


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
