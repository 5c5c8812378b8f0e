"""Packed documents do not see one another, under each attention that packing is allowed with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.packing import Collator
from mixfuse.train.model import attention as attention_module
from mixfuse.train.model import packed_attention
from mixfuse.train.model.attention import check_packing, choose, choose_implementation, fastest, register

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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, as transformers calls it
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", "flex_attention"])
def test_every_token_of_a_packed_document_has_its_loss_alone(attention: str, tiny_base: Path) -> None:
    from transformers import MixtralForCausalLM

    register()
    model = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention).eval()
    # Uncompiled, flex_attention is the same function; compiling it for a CPU takes a minute.
    with torch.compiler.set_stance("force_eager"):
        packed = token_losses(
            model, Collator(0, packed=True)([{"documents": DOCUMENTS[:2]}, {"documents": DOCUMENTS[2:]}])
        )
        padded = token_losses(model, Collator(0, packed=False)([{"documents": [document]} for document in DOCUMENTS]))
    assert len(packed) == sum(len(document["input_ids"]) - 2 for document in DOCUMENTS)
    assert packed.tolist() == pytest.approx(padded.tolist(), abs=1e-5)
    # Without their places they do see one another, so the comparison can fail.
    batch = Collator(0, packed=True)([{"documents": DOCUMENTS}])
    unplaced = {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    with torch.compiler.set_stance("force_eager"):
        leaking = token_losses(model, {key: batch[key] for key in ("input_ids", "labels", "ids")} | unplaced)
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
        check_packing("varlen", config, dtype)
    config.sliding_window = 4
    check_packing("sdpa", config, torch.float32)
    check_packing("varlen", config, torch.float32)


def test_what_cannot_run_here_is_refused(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        with pytest.raises(MixfuseError, match=f"{name} needs a GPU.*; use auto, which is varlen here"):
            choose_implementation(name, tiny_base, torch.bfloat16, packing=True)
    assert choose_implementation("auto", tiny_base, torch.bfloat16, packing=True) == "varlen"
    assert choose_implementation("auto", tiny_base, torch.bfloat16, packing=False) == "sdpa"
    assert choose_implementation("varlen", tiny_base, torch.bfloat16, packing=False) == "varlen"
    assert capsys.readouterr().out.splitlines()[0] == "attention: varlen (each document by itself)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the choice see a GPU of this capability, with these packages."""

    def see(capability: tuple[int, int], *packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: "flash-attn" in packages)
        monkeypatch.setattr(attention_module, "is_flash_attn_3_available", lambda: "flash-attn-3" in packages)

    return see


def test_the_fastest_that_is_there_is_chosen(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype = torch.bfloat16, *, packing: bool = True, dropout: float = 0.0) -> str:
        return fastest(dtype, packing=packing, dropout=dropout).name

    gpu((9, 0), "flash-attn", "flash-attn-3")
    assert (chosen(), chosen(dropout=0.1)) == ("flash_attention_3", "flash_attention_2")
    gpu((8, 0), "flash-attn", "flash-attn-3")
    assert chosen() == "flash_attention_2"
    gpu((9, 0))
    assert (chosen(), chosen(packing=False), chosen(dropout=0.1)) == ("varlen", "varlen", "sdpa")
    assert (chosen(torch.float32), chosen(torch.float32, packing=False)) == ("flex_attention", "sdpa")
    monkeypatch.setattr(packed_attention, "torch_has_varlen", lambda: False)
    assert (chosen(), chosen(packing=False)) == ("flex_attention", "sdpa")
    gpu((7, 5), "flash-attn")
    assert chosen() == "flex_attention"


def test_a_named_one_that_cannot_run_is_refused_with_what_can(gpu: Callable[..., None], tiny_base: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig.from_pretrained(tiny_base)
    gpu((9, 0))
    with pytest.raises(MixfuseError, match="flash_attention_2 needs the package flash-attn; use auto, which is varlen"):
        choose("flash_attention_2", config, torch.bfloat16, packing=True)
    config.attention_dropout = 0.1
    with pytest.raises(MixfuseError, match="varlen has no dropout, and the base's attention_dropout is not 0"):
        choose("varlen", config, torch.bfloat16, packing=True)


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_is_sdpa_with_padding_on_either_side_and_a_window(tiny_base: Path, window: int | None) -> None:
    """Logits at tokens and the gradients of all weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    register()
    config = MixtralConfig.from_pretrained(tiny_base)
    config.sliding_window = window
    ids = torch.randint(5, 4000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 3 + [1] * 6])
    found = {}
    for name in ("sdpa", "varlen"):
        model = MixtralForCausalLM.from_pretrained(
            tiny_base, config=config, dtype=torch.float32, attn_implementation=name
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.log_softmax(-1)[:, 7].sum().backward()
        found[name] = [logits.detach(), *(parameter.grad for _, parameter in sorted(model.named_parameters()))]
    for ours, theirs in zip(found["varlen"], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)  # float32, sums in another order


def test_positions_alone_tell_packed_documents_apart(tiny_base: Path) -> None:
    from transformers import MixtralForCausalLM

    register()
    model = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="varlen").eval()
    batch = Collator(0, packed=True)([{"documents": DOCUMENTS}])
    whole = token_losses(model, dict(batch))
    less = {key: batch[key] for key in ("input_ids", "labels", "ids", "position_ids")}
    assert token_losses(model, less).tolist() == pytest.approx(whole.tolist(), abs=1e-5)


def test_torchs_kernel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a GPU alone; what this machine can check is that the call binds, and means what ours means."""
    import inspect

    from torch.nn.attention import varlen as torch_varlen

    calls = []
    signature = inspect.signature(torch_varlen.varlen_attn)

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return args[0]

    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    monkeypatch.setattr(packed_attention, "has_kernel", lambda _: True)
    q, k = torch.zeros(12, 6, 32), torch.zeros(12, 2, 32)
    ends = torch.tensor([0, 7, 12])
    packed_attention.varlen(q, k, k, ends, 7)
    packed_attention.varlen(q, k, k, ends, 7, window=7)
    packed_attention.varlen(q, k, k, ends, 7, scale=0.5, window=4)
    assert [call["window_size"] for call in calls] == [(-1, 0), (-1, 0), (3, 0)]  # causal, causal, four tokens
    assert all(call["cu_seq_q"].dtype == torch.int32 and call["max_q"] == 7 and call["enable_gqa"] for call in calls)
    assert calls[2]["scale"] == 0.5


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", "flex_attention", "flash_attention_2"])
def test_on_a_gpu_documents_are_kept_apart(attention: str, tiny_base: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert choose_implementation(attention, tiny_base, torch.bfloat16, packing=True) == attention


@pytest.mark.zero3
@pytest.mark.slow
def test_a_packed_run_has_the_loss_of_its_chats_one_by_one(sft_recipe: Path, runs: Path, tiny_base: Path) -> None:
    """All sixteen chats in the first step of a run, whose adapter does nothing yet."""
    from transformers import MixtralForCausalLM

    from mixfuse.train.data.loss_mask import encode
    from mixfuse.train.model.tokenizer import load_tokenizer

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
