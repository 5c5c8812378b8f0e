"""Sequence parallelism: a group of processes divides each row's tokens, and in attention its heads instead.

DeepSpeed's `UlyssesSPAttentionHF` exchanges tokens for heads before attention and back after it (Ulysses, arXiv
2309.14509). Its gradient is that of one process, so ZeRO-3 and the loss need to know nothing of groups: each process
has tokens of its own, and the step's loss is the sum over all of them, divided by their number.

accelerate and transformers bring more around it (`ParallelismConfig`), which is not used. Their loader cannot skip what
a resumed run has seen, and names other examples for a step; their loss is the mean over micro batches; they evaluate on
undivided chats; and they take no attention but sdpa, of which DeepSpeed drops the mask, and flash-attn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixfuse.train.data.packing import DIVIDED


def divide_attention(model: Any, sequences: int) -> Any:
    """Makes the model's attention exchange tokens for heads in passes that ask for it (`DIVIDED`); all processes call.

    Other passes, such as those of probes, stay as they are: whole rows on each process.

    Args:
        model: The base, loaded with an implementation of `recipe.SEQUENCE_ATTENTION`.
        sequences: Processes that divide a row; they are neighbours.

    Returns:
        This process's group.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    name = model.config._attn_implementation
    whole = ALL_ATTENTION_FUNCTIONS[name]
    # A pass is one row of concatenated documents, so the batch size is 1.
    groups = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=name, sequence_parallel_size=sequences, micro_batch_size=1
    )
    exchanging = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, *tensors: Any, **kwargs: Any) -> Any:
        return (exchanging if kwargs.pop(DIVIDED, False) else whole)(module, *tensors, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    return groups.get_sequence_parallel_group()


class WholeBalance:
    """A model whose `aux_loss` is of a group's whole rows; from its own tokens alone, a process would balance its part.

    Args:
        model: What is called, with TRL's fused head.
        decoder: The module in it that returns `router_logits`.
        top_k: Experts a token.
        group: The processes that divide a row.
        padding: Tokens at the end of this process's part that are padding.
    """

    def __init__(self, model: Any, decoder: Any, top_k: int, group: Any, padding: int) -> None:
        self._model, self._decoder, self._top_k, self._group, self._padding = model, decoder, top_k, group, padding

    def __call__(self, **inputs: Any) -> Any:
        """The model's output."""
        seen: list[Any] = []
        hook = self._decoder.register_forward_hook(lambda module, args, output: seen.append(output.router_logits))
        try:
            output = self._model(**inputs)
        finally:
            hook.remove()
        output.aux_loss = balance_loss(seen[0], self._top_k, self._group, padding=self._padding)
        return output


def balance_loss(router_logits: Sequence[Tensor], top_k: int, group: Any, *, padding: int) -> Tensor:
    """This process's share of the load-balancing loss of whole rows, times the group's size.

    The loss is E·Σₑ fₑ·pₑ, with fₑ the share of choices that fall on expert e, and pₑ its mean probability (Switch
    Transformers, arXiv 2101.03961, eq. 4-6, as transformers computes it over all layers). f has no gradient, so it is
    summed over the group, and p is a sum: each process keeps the part of its tokens. The mean over a group of the
    values, and of their gradients, is the whole rows'.

    Args:
        router_logits: For each layer (T/N, E).
        top_k: Experts a token.
        group: The N processes that divide a row.
        padding: Tokens at the end of this process's part that do not count.
    """
    experts = router_logits[0].shape[-1]
    tokens = len(router_logits[0]) - padding
    counts_E = router_logits[0].new_zeros(experts, dtype=torch.float32)  # noqa: N806
    sums_E = torch.zeros_like(counts_E)  # noqa: N806
    for logits_TE in router_logits:  # noqa: N806
        weights_TE = logits_TE[:tokens].softmax(-1)  # noqa: N806
        chosen = weights_TE.topk(top_k, dim=-1).indices
        counts_E += torch.bincount(chosen.flatten(), minlength=experts)  # noqa: N806
        sums_E = sums_E + weights_TE.float().sum(0)  # noqa: N806
    whole = torch.cat([counts_E, counts_E.new_tensor([tokens * len(router_logits)])])
    torch.distributed.all_reduce(whole, group=group)
    rows = whole[-1]
    return experts * torch.sum(whole[:-1] / rows * sums_E / rows) * torch.distributed.get_world_size(group)
