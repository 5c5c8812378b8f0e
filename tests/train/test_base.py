"""The embedded base model: its tokenizer, and the proof that upcycling loses nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixfuse.contracts.adapter import fingerprint
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.model import embedded_base
from mixfuse.train.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_the_tokenizer_is_smollm2s_with_its_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Héllo 12"}, {"role": "assistant", "content": "B"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith("<|im_start|>user\nHéllo 12<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 49152


def test_padding_is_not_the_end_of_an_answer(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_upcycled_model_says_what_the_dense_one_said(dense: LlamaForCausalLM, tokenizer: Any) -> None:
    model = embedded_base.upcycle(dense, experts=3).eval()
    assert model.config.num_local_experts == 3
    assert embedded_base._check_equal(model, dense, tokenizer) < embedded_base.LOGIT_TOLERANCE
    router = model.model.layers[0].mlp.gate.weight
    assert router.std() > 0, "the router is not random: all tokens would go to the same experts"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_expert_that_differs_fails_the_build(value: float, dense: LlamaForCausalLM, tokenizer: Any) -> None:
    model = embedded_base.upcycle(dense, experts=2).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[1] = value
    with pytest.raises(MixfuseError, match="logits differ from the dense model's"):
        embedded_base._check_equal(model, dense, tokenizer)


def test_two_seeds_make_two_bases_and_one_seed_one(tiny_base: Path, tmp_path: Path) -> None:
    embedded_base.build(tmp_path / "same", tiny=True)
    embedded_base.build(tmp_path / "other", tiny=True, seed=1)
    here, same, other = fingerprint(tiny_base), fingerprint(tmp_path / "same"), fingerprint(tmp_path / "other")
    assert same == here
    assert other.weights != here.weights
    assert (other.config, other.tokenizer, other.chat_template) == (here.config, here.tokenizer, here.chat_template)


def test_a_folder_that_exists_and_a_single_expert_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match="exists already"):
        embedded_base.build(tmp_path, tiny=True)
    with pytest.raises(MixfuseError, match="--experts 1"):
        embedded_base.build(tmp_path / "new", tiny=True, experts=1)
    assert not (tmp_path / "new").exists()
