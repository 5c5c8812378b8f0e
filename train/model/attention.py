"""The attention implementation of a run, and the proof that it keeps packed documents apart."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named, family_of
from mixfuse.train.data.packing import pack_batch
from mixfuse.train.model.family_classes import classes_of


def choose(wanted: str, base: Path, dtype: torch.dtype, *, packing: bool = False) -> str:
    """The implementation to load the base with.

    Args:
        wanted: The recipe's `attention`.
        base: The base model, whose attention is probed where documents are packed.
        dtype: What it is loaded in.
        packing: Documents are packed.

    Raises:
        MixfuseError: It cannot run here, or it lets packed documents see one another.
    """
    gpu = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "flash_attention_2" if gpu and dtype == torch.bfloat16 and find_spec("flash_attn") else "sdpa"
    if wanted.startswith("flash_attention") and not (gpu and dtype == torch.bfloat16):
        raise MixfuseError(f"attention: {wanted} needs a GPU and dtype bfloat16; use sdpa")
    if packing:
        check_packing(wanted, classes_of(family_of(base).model_type).config.from_pretrained(base), dtype)
    return wanted


@torch.no_grad()
def check_packing(attention: str, config: Any, dtype: torch.dtype) -> None:
    """Proves on a one-layer model of the base's kind that a packed document says what it says alone.

    A model without the base's weights: the question is what the mask does, not what the weights say. Whoever lets the
    second document see the first changes its output by about as much as the output itself.

    Args:
        attention: transformers' name of the implementation.
        config: The base's; its sliding window, for one, takes part in the mask.
        dtype: What is computed in.

    Raises:
        MixfuseError: The implementation cannot be loaded, or the documents are not kept apart.
    """
    small = copy.deepcopy(config)
    family = family_named(config.model_type)
    small.update({"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": 64, family.inner_key: 32, "head_dim": 32,
                  "num_attention_heads": 2, "num_key_value_heads": 1, family.experts_keys[0]: 2,
                  "num_experts_per_tok": 1, "pad_token_id": None, "initializer_range": 0.5})  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 32, (length,), generator=generator) for length in (7, 5)]
    with torch.random.fork_rng():
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
    apart = float((together - alone).abs().max() / alone.abs().max())
    if not apart <= tolerance:
        raise MixfuseError(
            f"packing: attention {attention} lets packed documents see one another (their output changes by "
            f"{apart:.0%}); set packing to false, or attention to sdpa or flash_attention_2"
        )


def _to(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value
