"""Packed documents do not see one another, under each attention that packing is allowed with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.packing import Collator
from mixfuse.train.model.attention import check_packing, choose_implementation

DOCUMENTS = [
    {"id": str(number), "input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    for number, ids in enumerate([[40, 1719, 260, 2734, 28, 351], [253, 1205, 30], [99, 98, 97, 96, 260, 2734, 28]])
]


def token_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of each labelled token, in order of the documents."""
    labels = batch.pop("labels")
    names = batch.pop("ids")
    assert names == [document["id"] for document in DOCUMENTS[: len(names)]]
    with torch.no_grad():
        scores = model(**batch, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), labels[:, 1:], reduction="none")
    return losses[labels[:, 1:] != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_token_of_a_packed_document_has_its_loss_alone(attention: str, tiny_base: Path) -> None:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention).eval()
    packed = token_losses(model, Collator(0, packed=True)([{"documents": DOCUMENTS[:2]}, {"documents": DOCUMENTS[2:]}]))
    padded = token_losses(model, Collator(0, packed=False)([{"documents": [document]} for document in DOCUMENTS]))
    assert len(packed) == sum(len(document["input_ids"]) - 2 for document in DOCUMENTS)
    assert packed.tolist() == pytest.approx(padded.tolist(), abs=1e-5)
    # Without their places they do see one another, so the comparison can fail.
    batch = Collator(0, packed=True)([{"documents": DOCUMENTS}])
    leaking = token_losses(model, {key: batch[key] for key in ("input_ids", "labels", "ids")})
    assert (leaking - padded).abs().max() > 0.1


@pytest.fixture
def leaky() -> Iterator[str]:
    """An attention that knows nothing of masks but causality, as a kernel from elsewhere might."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def causal(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("leaky", causal)
    yield "leaky"
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("leaky")


def test_an_attention_that_lets_documents_see_one_another_is_refused(leaky: str, tiny_base: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig.from_pretrained(tiny_base)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(MixfuseError, match="attention leaky lets packed documents see one another"):
            check_packing(leaky, config, dtype)
        check_packing("sdpa", config, dtype)
        check_packing("eager", config, dtype)
    config.sliding_window = 4
    check_packing("sdpa", config, torch.float32)


def test_what_cannot_run_here_is_refused(tiny_base: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(MixfuseError, match="flash_attention_2 needs a GPU"):
        choose_implementation("flash_attention_2", tiny_base, torch.bfloat16, packing=True)
    assert choose_implementation("auto", tiny_base, torch.bfloat16, packing=True) == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_on_a_gpu_documents_are_kept_apart(attention: str, tiny_base: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert choose_implementation(attention, tiny_base, torch.bfloat16, packing=True) == attention


@pytest.mark.zero3
def test_a_packed_run_has_the_loss_of_its_chats_one_by_one(sft_recipe: Path, runs: Path, tiny_base: Path) -> None:
    """All sixteen chats in the first step of a run, whose adapter does nothing yet."""
    from transformers import MixtralForCausalLM

    from mixfuse.train.data.loss_mask import encode
    from mixfuse.train.model.load import load_tokenizer

    step = "optimizer={steps: 1, batch_size: 1, micro_batch: 1, warmup_steps: 0}"
    keys = ["packing=true", "max_length=1024", "router_aux_loss_coef=0", "gradient_checkpointing=true", step]
    run = harness.train("sft", sft_recipe, f"out={runs / 'packed'}", *keys)
    assert run.record["metrics"]["examples"] == 16
    (row,) = run.steps

    model = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(tiny_base)
    collate, tokens = Collator(0, packed=False), 0
    losses = []
    for line in (runs / "chats.jsonl").read_text().splitlines():
        chat = encode(json.loads(line)["messages"], tokenizer, "all")
        batch = collate([{"id": "0", **chat._asdict()}])
        tokens += batch["input_ids"].numel()
        losses.append(token_losses(model, batch))
    assert row["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert row["num_tokens"] == tokens
