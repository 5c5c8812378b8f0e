"""The recipes of Mixtral 8x22B with its real tokenizer: everything before the first forward, without a weight."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from mistral_v3 import PUBLISHED
from peft import get_peft_model
from train_harness import PROJECT
from transformers import MixtralConfig, MixtralForCausalLM

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.chat_template import FOLD
from mixfuse.contracts.families import family_of
from mixfuse.contracts.strict_yaml import load
from mixfuse.train.data.chat_data import chat_data
from mixfuse.train.data.loss_mask import IGNORED
from mixfuse.train.data.packing import Collator
from mixfuse.train.data.pair_data import pairs_datasets
from mixfuse.train.data.pairs import Preference, write
from mixfuse.train.model import expert_lora
from mixfuse.train.model.load import lora_config, mark_leaves
from mixfuse.train.model.quantised_experts import built
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import JudgeRecipe, SftRecipe
from mixfuse.train.stages.checks import check_recipe, check_template

mistral_common = pytest.importorskip("mistral_common")
V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
RECIPES = PROJECT / "configs" / "mixtral-8x22b"
EXPERT_WEIGHTS = 56 * 8 * 3 * 6144 * 16384
BASE_WEIGHTS = 140_630_071_296
HELD = {"": 2 * BASE_WEIGHTS, "_quantised": 2 * (BASE_WEIGHTS - EXPERT_WEIGHTS) + EXPERT_WEIGHTS * 17 // 32}
"""Bytes of the base: in bfloat16, and with 4 bits and a 64th of a bfloat16 for each weight of an expert."""
# The first form of its templates: a list, of which none takes a system message.
LISTED = [
    {
        "name": "default",
        "template": "{{bos_token}}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    },
    {"name": "tool_use", "template": PUBLISHED},
]


@pytest.fixture(scope="module", params=["published", "listed"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's folder without its weights."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("base")
    shutil.copy(RECIPES / "model" / "config.json", folder)
    shutil.copy(V3, folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    template = PUBLISHED if request.param == "published" else LISTED
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.fixture(scope="module", params=["", "_quantised"])
def variant(request: pytest.FixtureRequest) -> str:
    """What the names of a pair of recipes end with."""
    return str(request.param)


@pytest.fixture(scope="module")
def on_meta(variant: str) -> Any:
    """The model with the recipes' LoRA, as shapes."""
    expert_lora.register()
    config = MixtralConfig.from_dict(json.loads((RECIPES / "model" / "config.json").read_text()))
    recipe = load(RECIPES / f"domain_sft{variant}.yaml", SftRecipe, [])
    assert bool(recipe.quantization) is bool(variant)
    with torch.device("meta"), default_dtype(torch.bfloat16), built(recipe.quantization):
        model = MixtralForCausalLM(config)
        model.set_experts_implementation(expert_lora.EXPERTS_IMPLEMENTATION)
        mark_leaves(model)
        return get_peft_model(
            model, lora_config(family_of(RECIPES / "model"), recipe.lora), autocast_adapter_dtype=False
        )


def chats(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You are a bank's clerk."},
        {"role": "user", "content": f"What does account {number} cost?"},
        {"role": "assistant", "content": f"{number} euros"},
        {"role": "user", "content": "And a card?"},
        {"role": "assistant", "content": "Nothing"},
    ]


def test_sft_up_to_the_first_forward(base: Path, variant: str, on_meta: Any, tmp_path: Path) -> None:
    rows = [{"id": str(n), "messages": chats(n)} for n in range(120)]
    file = harness.write_jsonl(tmp_path / "chats.jsonl", rows)
    overrides = [f"base={base}", f"out={tmp_path / 'run'}", f"data={json.dumps([str(file)])}", "data_processes=1"]
    recipe = load(RECIPES / f"domain_sft{variant}.yaml", SftRecipe, overrides)
    check_recipe(recipe)
    check_template(recipe)
    tokenizer = load_tokenizer(recipe.base, recipe.chat_template)
    data = chat_data(recipe, tokenizer)
    for row in data.table:
        text = tokenizer.decode(row["input_ids"])
        assert text.count("bank's clerk") == 1
        said = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert said.count("</s>") == 2
        assert "INST" not in said
        assert "cost" not in said
    batch = Collator(tokenizer.pad_token_id, packed=recipe.packing)([data.train[0]])
    assert len(batch["input_ids"][0]) <= recipe.max_length
    embedded = on_meta.get_input_embeddings()(batch["input_ids"].to("meta"))
    assert embedded.shape == (*batch["input_ids"].shape, 6144)
    assert int(batch["input_ids"].max()) < on_meta.config.vocab_size
    length = batch["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    logits = on_meta(input_ids=batch["input_ids"].to("meta"), attention_mask=mask).logits
    assert logits.shape == (1, length, on_meta.config.vocab_size)
    held = sum(p.nbytes for p in on_meta.parameters() if not p.requires_grad)
    assert held == HELD[variant]


def test_the_judge_up_to_the_first_forward(base: Path, variant: str, on_meta: Any, tmp_path: Path) -> None:
    pairs = [
        Preference(
            f"Question {n}?", f"right {n}", f"wrong {n}", "made", conversation=tuple([*chats(n)[:3], *chats(n)[3:4]])
        )
        for n in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    write(file, pairs[:8], pairs[8:])
    overrides = [
        *(f"base={base}", f"out={tmp_path / 'run'}", f"data={file}"),
        f"evaluation={json.dumps({'data': str(file.with_name('pairs.dev.jsonl'))})}",
    ]
    recipe = load(RECIPES / f"judge_dpo{variant}.yaml", JudgeRecipe, overrides)
    check_recipe(recipe)
    check_template(recipe)
    tokenizer: Any = load_tokenizer(recipe.base, recipe.chat_template)
    assert tokenizer.chat_template.startswith(FOLD)
    data = pairs_datasets(recipe, tokenizer)
    assert len(data.train) == 16
    for row in data.train:
        text = tokenizer.decode(row["prompt_ids"])
        for part in (judge_protocol.SYSTEM, "You are a bank's clerk.", "right ", "wrong ", "And a card?"):
            assert part in text
        assert text.rstrip().endswith("[/INST]"), "the verdict does not follow the prompt"
        assert tokenizer.decode(row["chosen_ids"][0]).strip() in judge_protocol.VERDICTS
        assert max(row["prompt_ids"] + row["chosen_ids"]) < on_meta.config.vocab_size
