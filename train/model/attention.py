"""Chooses the attention implementation of a run, and checks that it separates packed documents."""

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named, family_of
from mixfuse.train.data.packing import pack_batch
from mixfuse.train.model import packed_attention
from mixfuse.train.model.family_classes import classes_of
from mixfuse.train.processes import worker
from mixfuse.train.recipe import SEQUENCE_ATTENTION

VARLEN = "varlen"
"""transformers' name of the attention in `packed_attention.py`, once `register` has been called."""
_AMPERE, _HOPPER = (8, 0), (9, 0)


class Choice(NamedTuple):
    """An attention implementation.

    Attributes:
        name: Its name in transformers.
        why: Why it is the fastest here, or that the recipe names it.
    """

    name: str
    why: str


def fastest(dtype: torch.dtype, *, packing: bool, dropout: float = 0.0, sequences: int = 1) -> Choice:
    """Chooses the fastest implementation that this machine has: what `attention: auto` means.

    The order is that of the kernels: FlashAttention 3, FlashAttention 2, torch's own build of the latter, compiled
    block masks, and last a mask over all pairs of tokens. `scripts/gpu-check packed-attention` measures them.

    Args:
        dtype: The dtype in which the base is loaded.
        packing: Whether documents are packed.
        dropout: The base's `attention_dropout`; only sdpa and FlashAttention 2 have it.
        sequences: Processes that divide a row; with several, documents are packed.

    Raises:
        MixfuseError: Rows are divided, and no implementation for it can run here.
    """
    kinds = _kinds(dtype, packing=packing or sequences > 1, dropout=dropout)
    if sequences > 1:
        kinds = {name: kinds[name] for name in SEQUENCE_ATTENTION}
    for name, (why, problem) in kinds.items():
        if not problem:
            return Choice(name, why)
    problems = "; ".join(f"{name} {problem}" for name, (_, problem) in kinds.items())
    raise MixfuseError(f"parallel.sequences: no attention that it can divide runs here: {problems}")


def _kinds(dtype: torch.dtype, *, packing: bool, dropout: float) -> dict[str, tuple[str, str]]:
    """Each implementation, the fastest first, with what speaks for it, and why it cannot be used here or should not."""
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(worker.device()) if gpu else (0, 0)
    half = "" if gpu and dtype == torch.bfloat16 and capability >= _AMPERE else "needs a GPU and dtype bfloat16"
    dropped = "has no dropout, and the base's attention_dropout is not 0" if dropout else ""
    newer = "" if is_flash_attn_3_available() and capability >= _HOPPER else "needs flash-attn-3 and a Hopper GPU"
    package = "" if is_flash_attn_2_available() else "needs the package flash-attn"
    newest = "" if packed_attention.torch_has_varlen() else "needs torch 2.10"
    compiled = ("" if packing else "is for packing") if gpu else "needs a GPU"
    if gpu:
        kernel, varlen = "torch's own FlashAttention; no package needed", newest or half
    else:  # it separates documents without a mask; one document is sdpa's
        kernel, varlen = "each document by itself", "" if packing else "gains nothing on a CPU without packing"
    return {
        "flash_attention_3": ("flash-attn-3 is installed", half or newer or dropped),
        "flash_attention_2": ("flash-attn is installed", half or package),
        VARLEN: (kernel, varlen or dropped),
        "flex_attention": ("torch's block masks, compiled", compiled or dropped),
        "sdpa": ("nothing else that separates documents can run" if packing else "torch's ordinary kernels", ""),
    }


def choose_implementation(
    setting: str, base: Path, dtype: torch.dtype, *, packing: bool = False, sequences: int = 1
) -> str:
    """Chooses the attention implementation to load the base with, and says which on the first process.

    Args:
        setting: The recipe's `attention`.
        base: The base model's folder. Its attention is tested if documents are packed.
        dtype: The dtype in which the base is loaded.
        packing: Whether documents are packed.
        sequences: Processes that divide a row; with several, documents are packed.

    Returns:
        transformers' name of the implementation.

    Raises:
        MixfuseError: The implementation cannot run here, or tokens attend to other packed documents.
    """
    register()
    config = classes_of(family_of(base).model_type).config.from_pretrained(base)
    choice = choose(setting, config, dtype, packing=packing, sequences=sequences)
    if packing or sequences > 1:
        check_packing(choice.name, config, dtype)
    if os.environ.get("RANK", "0") == "0":
        print(f"attention: {choice.name} ({choice.why})", flush=True)
    return choice.name


def choose(setting: str, config: Any, dtype: torch.dtype, *, packing: bool, sequences: int = 1) -> Choice:
    """Chooses as `choose_implementation` does, without a test.

    Raises:
        MixfuseError: The implementation that the recipe names cannot run here, or none that can divide rows.
    """
    dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
    if setting == "auto":
        return fastest(dtype, packing=packing, dropout=dropout, sequences=sequences)
    _, problem = _kinds(dtype, packing=True, dropout=dropout).get(setting, ("", ""))
    if problem:
        best = fastest(dtype, packing=packing, dropout=dropout, sequences=sequences).name
        raise MixfuseError(f"attention: {setting} {problem}; use auto, which is {best} here")
    return Choice(setting, "as the recipe says")


def register() -> None:
    """Registers `VARLEN` with transformers, for this process."""
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, flash_attention_mask)


def varlen_forward(  # noqa: PLR0917 - as transformers calls it
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by `packed_attention.varlen`.

    The documents are those of `cu_seq_lens_q` and `max_length_q` (packed, as `pack_batch` makes them), of a mask
    (padded), of positions that begin anew in a single row, or else the rows.

    Args:
        module: The layer's attention.
        query: (B, A, S, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        attention_mask: (B, S), true at tokens, or None.
        scaling: The factor of the products.
        sliding_window: How many tokens a query sees.
        dropout: Must be 0.
        **kwargs: The boundaries of packed documents, and what other implementations take.

    Returns:
        (B, S, A, D), zero at padding; and no weights.

    Raises:
        MixfuseError: Dropout is asked for, or there are keys of a cache.
    """
    rows, heads, length, size = query.shape
    if dropout or key.shape[2] != length:
        raise MixfuseError(f"attention: {VARLEN} has no dropout and no cache of keys; use sdpa")
    q, k, v = (tensor.transpose(1, 2).reshape(rows * length, -1, size) for tensor in (query, key, value))
    ends, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    kept = None
    if ends is None or longest is None:
        if attention_mask is not None:
            kept = attention_mask.flatten().nonzero()[:, 0]
            lengths = attention_mask.sum(1)
        else:
            lengths = _lengths(kwargs.get("position_ids"), rows, length, query.device)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        longest = int(lengths.max())
    if kept is not None:
        q, k, v = q[kept], k[kept], v[kept]
    out = packed_attention.varlen(q, k, v, ends, int(longest), scale=scaling, window=sliding_window)
    if kept is not None:
        out = out.new_zeros(rows * length, heads, size).index_copy(0, kept, out)
    return out.view(rows, length, heads, size), None


def _lengths(positions: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """The lengths of the documents: the rows', or in a single row those between positions that begin anew."""
    if rows == 1 and positions is not None and positions.shape == (1, length):
        begins = torch.cat([positions.new_zeros(1), (positions[0].diff() != 1).nonzero()[:, 0] + 1])
        return torch.diff(begins, append=begins.new_tensor([length]))
    return torch.full((rows,), length, dtype=torch.int64, device=device)


@torch.no_grad()
def check_packing(attention: str, config: Any, dtype: torch.dtype) -> None:
    """Checks that a document has the same output in a pack as alone.

    The check runs a random one-layer model of the base's family. It tests the mask, so it does not need the base's
    weights. If tokens of the second document attend to the first, the output changes by about its own size.

    Args:
        attention: transformers' name of the implementation.
        config: The base's config. Its sliding window, for example, affects the mask.
        dtype: The dtype of the computation.

    Raises:
        MixfuseError: The implementation cannot be loaded, or tokens attend to other documents.
    """
    register()
    small = copy.deepcopy(config)
    family = family_named(config.model_type)
    small.update({"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": 64, family.inner_key: 32, "head_dim": 32,
                  "num_attention_heads": 2, "num_key_value_heads": 1, family.experts_keys[0]: 2,
                  "num_experts_per_tok": 1, "pad_token_id": None, "initializer_range": 0.5})  # fmt: skip
    device = worker.device()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 32, (length,), generator=generator) for length in (7, 5)]
    with torch.random.fork_rng(devices=[]):  # the model is made on the CPU; by default it would look at every GPU
        torch.manual_seed(0)
        try:
            small._attn_implementation = attention
            model = classes_of(family.model_type).decoder(small).to(device, dtype).eval()
        except (ImportError, ValueError) as error:
            raise MixfuseError(f"attention: {attention} cannot be used here: {error}") from None
    batch = {name: _to(value, device) for name, value in pack_batch(documents, documents).items() if name != "labels"}
    together = model(**batch, use_cache=False).last_hidden_state[0, len(documents[0]) :].float()
    alone = model(input_ids=documents[1][None].to(device), use_cache=False).last_hidden_state[0].float()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    change = float((together - alone).abs().max() / alone.abs().max())
    if not change <= tolerance:
        raise MixfuseError(
            f"packing: attention {attention} lets packed documents see one another (their output changes by "
            f"{change:.0%}); set packing to false, or attention to auto"
        )


def _to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value
