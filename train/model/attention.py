"""Chooses the attention implementation of a run, and checks that it separates packed documents."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named, family_of
from mixfuse.train.data.packing import pack_batch
from mixfuse.train.model.family_classes import classes_of


def choose_implementation(setting: str, base: Path, dtype: torch.dtype, *, packing: bool = False) -> str:
    """Returns transformers' name of the attention implementation to load the base with.

    Args:
        setting: The recipe's `attention`.
        base: The base model's folder. Its attention is tested if documents are packed.
        dtype: The dtype in which the base is loaded.
        packing: Whether documents are packed.

    Raises:
        MixfuseError: The implementation cannot run here, or tokens attend to other packed documents.
    """
    gpu = torch.cuda.is_available()
    if setting == "auto":
        setting = "flash_attention_2" if gpu and dtype == torch.bfloat16 and find_spec("flash_attn") else "sdpa"
    if setting.startswith("flash_attention") and not (gpu and dtype == torch.bfloat16):
        raise MixfuseError(f"attention: {setting} needs a GPU and dtype bfloat16; use sdpa")
    if packing:
        check_packing(setting, classes_of(family_of(base).model_type).config.from_pretrained(base), dtype)
    return setting


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
    change = float((together - alone).abs().max() / alone.abs().max())
    if not change <= tolerance:
        raise MixfuseError(
            f"packing: attention {attention} lets packed documents see one another (their output changes by "
            f"{change:.0%}); set packing to false, or attention to sdpa or flash_attention_2"
        )


def _to(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value
