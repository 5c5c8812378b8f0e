"""A tiny Mixtral, adapters for it in both layouts, and what transformers and PEFT say of a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from role_harness import made, stores  # noqa: F401 - fixtures of this folder

EXPERTS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Tiny:
    """Folders: the base, the adapters as PEFT saved them, and the adapter directories exported from them.

    "one" is a domain adapter, "two" a judge, "experts" a domain adapter without attention, "attention" one without
    experts, "chosen" one of some experts of the second layer, with rsLoRA, as training saves it.
    """

    base: Path
    fused: dict[str, Path]
    served: dict[str, Path]
    logprobs: Callable[[str, str | list[int]], list[float]]
    """(adapter or "base", text or tokens) → the log-prob of each token after the first, by transformers and PEFT."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, MixtralForCausalLM

    from mixfuse.train.adapters.export import export

    root = tmp_path_factory.mktemp("tiny")
    base = root / "base"
    _save_base(base)
    fused = {
        "one": _save_adapter(base, root / "one", seed=1, rank=4, modules=ATTENTION, parameters=FUSED_EXPERTS),
        "two": _save_adapter(base, root / "two", seed=2, rank=8, modules=ATTENTION, parameters=FUSED_EXPERTS),
        "experts": _save_adapter(base, root / "experts", seed=3, rank=4, modules=[], parameters=FUSED_EXPERTS),
        "attention": _save_adapter(base, root / "attention", seed=5, rank=2, modules=ATTENTION, parameters=[]),
        "rank 12": _save_adapter(base, root / "r12", seed=6, rank=12, modules=ATTENTION, parameters=FUSED_EXPERTS),
        "rank 3": _save_adapter(base, root / "r3", seed=7, rank=3, modules=ATTENTION, parameters=FUSED_EXPERTS),
    }
    fused["chosen"] = _save_chosen(base, root / "chosen")
    served = {name: root / f"{name}-served" for name in fused}
    for name, path in fused.items():
        export(path, served[name], base=base, role="judge" if name == "two" else "domain")
    tokenizer = AutoTokenizer.from_pretrained(base)
    models: dict[str, torch.nn.Module] = {}

    def logprobs(name: str, text: str | list[int]) -> list[float]:
        if name not in models:
            model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            models[name] = model if name == "base" else PeftModel.from_pretrained(model, fused[name]).eval()
        ids = torch.tensor([tokenizer(text).input_ids if isinstance(text, str) else text])
        with torch.no_grad():
            scores = models[name](ids).logits[0].float().log_softmax(-1)
        return [float(scores[position, token]) for position, token in enumerate(ids[0, 1:])]

    return Tiny(base, fused, served, logprobs)


def _save_base(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention wants heads of 32 or more
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.15,  # so that experts and adapters have something to say
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).float().save_pretrained(path)


def _save_adapter(base: Path, path: Path, *, seed: int, rank: int, modules: list[str], parameters: list[str]) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=modules, target_parameters=parameters)
    model = get_peft_model(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    return path


def _save_chosen(base: Path, path: Path) -> Path:
    import torch
    from peft import get_peft_model

    from mixfuse.contracts.families import family_of
    from mixfuse.train.adapters.saving import save_peft
    from mixfuse.train.model.load import load_base, lora_config
    from mixfuse.train.recipe import Lora

    lora = Lora(r=4, alpha=8, rslora=True, dropout=0.1, experts={1: (0, 2)})
    model = get_peft_model(load_base(base, torch.float32), lora_config(family_of(base), lora))
    weights = {}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
                weights[name.replace(".default.", ".")] = weight.detach().clone()
    path.mkdir()
    save_peft(model, weights, path)
    return path
