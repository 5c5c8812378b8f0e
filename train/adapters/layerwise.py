"""The base with an adapter, computed by transformers and PEFT a layer at a time, in the memory of one layer.

The weights of one decoder layer are read, all prompts pass through it, and they are dropped for the next layer's. So a
model that no machine here could hold gives its log-probabilities in float32: 8x22B takes 10 GB for a layer, and as much
again while PEFT adds the adapter to it.
"""

import copy
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.initialization import no_init_weights

from mixfuse.contracts import adapter as contract
from mixfuse.contracts.adapter_weights import safetensors_header
from mixfuse.contracts.bounded_json import read_object
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import config_of, family_of
from mixfuse.contracts.files import write_json
from mixfuse.contracts.peft_config import MOST_CONFIG_BYTES
from mixfuse.train.model.family_classes import classes_of
from mixfuse.train.model.load import Checkpoint

_LAYER = re.compile(r"(?<![\w])layers\.(\d+)(?=\.)")
_ROWS = 512  # of logits at once: a large vocabulary's take 300 MB

Alter = Callable[[str, torch.Tensor], torch.Tensor]
"""(name of a weight of the base, its values) → other values, e.g. as a quantised engine rounds them."""


@dataclass(frozen=True)
class Streams:
    """The last layer's hidden states of each prompt, (tokens, H), and what turns them into logits.

    Attributes:
        base: Of the base alone.
        adapted: Under the adapter.
        no_experts: Under the adapter without its experts; None if it trains none.
        head: (rows of hidden states) → their logits, float32.
    """

    base: list[torch.Tensor]
    adapted: list[torch.Tensor]
    no_experts: list[torch.Tensor] | None
    head: Callable[[torch.Tensor], torch.Tensor]

    def logprobs(self, hidden: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Each prompt's log-probabilities of its tokens but the first, each given those before it, in nats."""
        result = []
        for rows, prompt in zip(hidden, prompts, strict=True):
            said: list[float] = []
            for start in range(0, len(prompt) - 1, _ROWS):
                following = torch.tensor(prompt[1:][start : start + _ROWS], device=rows.device)
                scores = self.head(rows[start : start + len(following)]).log_softmax(-1)
                said += scores.gather(-1, following[:, None])[:, 0].tolist()
            result.append(said)
        return result


@torch.no_grad()
def streams(directory: Path, base: Path, prompts: Sequence[Sequence[int]], *, alter: Alter | None = None) -> Streams:
    """Passes prompts through the base, with and without an adapter, in float32, on a GPU if there is one.

    Args:
        directory: An adapter directory. Its fused adapter (`peft/`) is used if it has one.
        base: The base model.
        prompts: Token ids.
        alter: Changes the base's linear weights as they are read; None: none.

    Raises:
        MixfuseError: A weight of the base is missing, or PEFT does not apply every weight of the adapter.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _Base(base, device, alter)
    adapter = _Adapter(directory / "peft" if (directory / "peft").is_dir() else directory)
    hidden = model.embedded(prompts)
    found = {"base": hidden, "adapted": hidden}
    if adapter.has_experts:
        found["no_experts"] = hidden
    for number in range(model.layers):
        layer = model.layer(number)
        found["base"] = model.through(layer, found["base"])
        wrapped = adapter.on(layer, number)
        if wrapped is None:
            for name in found.keys() - {"base"}:
                found[name] = model.through(layer, found[name])
            continue
        inner = wrapped.get_base_model()
        for name in ("adapted", "no_experts"):
            if name not in found:
                continue
            if name == "no_experts":
                for key, parameter in wrapped.named_parameters():
                    if ".mlp.experts." in key and ".lora_B." in key:
                        parameter.zero_()
            wrapped.merge_adapter()  # once, not for each prompt
            found[name] = model.through(inner, found[name])
            wrapped.unmerge_adapter()
        del wrapped, inner, layer
    adapter.check_all_used()
    return Streams(found["base"], found["adapted"], found.get("no_experts"), model.head())


class _Base:
    """The base's layers, each a causal model of one layer, with a vocabulary that takes no memory."""

    def __init__(self, base: Path, device: torch.device, alter: Alter | None) -> None:
        family = family_of(base)
        family.shape(config_of(base))  # refuses variants that are not supported
        self._classes = classes_of(family.model_type)
        self._config = self._classes.config.from_pretrained(base, local_files_only=True)
        self._checkpoint = Checkpoint(base, family)
        self._device, self._alter = device, alter
        self.layers: int = self._config.num_hidden_layers

    def embedded(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The embeddings of each prompt's tokens."""
        table = self._checkpoint.tensor("model.embed_tokens.weight")
        return [table[torch.tensor(prompt)].float().to(self._device) for prompt in prompts]

    def layer(self, number: int) -> Any:
        """Layer `number`, as the only one of a model."""
        with no_init_weights():
            model = self._classes.causal_lm._from_config(self._alone(number), dtype=torch.float32).eval()
        for name, parameter in model.model.layers[0].named_parameters():
            for index, key in self._checkpoint.pieces_of(f"model.layers.{number}.{name}", parameter.shape):
                stored = self._checkpoint.tensor(key).float()
                if self._alter is not None and stored.dim() == 2 and not key.endswith("gate.weight"):
                    stored = self._alter(key, stored)
                parameter.data[index].copy_(stored)
        model.model.norm = torch.nn.Identity()
        return model.to(self._device)

    def _alone(self, number: int) -> Any:
        """The config of a model of one layer."""
        config = copy.deepcopy(self._config)
        config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 1, 8, False
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number]]
        return config

    @staticmethod
    def through(layer: Any, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each prompt's hidden states after a layer, (tokens, H); prompts of one length pass together."""
        found: dict[int, torch.Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for number, rows in enumerate(prompts):
            by_length.setdefault(len(rows), []).append(number)
        for numbers in by_length.values():
            batch = torch.stack([prompts[number] for number in numbers])
            found.update(zip(numbers, layer.model(inputs_embeds=batch, use_cache=False).last_hidden_state, strict=True))
        return [found[number] for number in range(len(prompts))]

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The last norm and the output layer."""
        tied = self._config.tie_word_embeddings
        weight = self._checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight").to(self._device)
        with torch.device("meta"):
            norm = self._classes.decoder(self._alone(0)).norm
        norm = norm.to_empty(device=self._device).float()
        norm.weight.data.copy_(self._checkpoint.tensor("model.norm.weight").float())
        return lambda rows: norm(rows) @ weight.float().T


class _Adapter:
    """A PEFT adapter, whose part for one layer PEFT puts on a model of that layer alone."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._config = read_object(folder / contract.CONFIG, most=MOST_CONFIG_BYTES)
        self._file = safe_open(folder / contract.WEIGHTS, framework="pt")
        self._folder = folder
        self._names: dict[int, list[str]] = {}
        for name in safetensors_header(folder / contract.WEIGHTS):
            found = _LAYER.search(name)
            if found is None:
                raise MixfuseError(f"{folder}: {name} belongs to no layer", kind="adapter")
            self._names.setdefault(int(found[1]), []).append(name)
        self._unused = set(self._names)
        self.has_experts = any(".experts." in name for names in self._names.values() for name in names)

    def on(self, layer: Any, number: int) -> PeftModel | None:
        """The layer under the adapter; None if the adapter leaves it as it is."""
        if number not in self._names:
            return None
        self._unused.discard(number)
        with tempfile.TemporaryDirectory(prefix="mixfuse-") as folder:
            write_json(Path(folder) / contract.CONFIG, self._config_of(number))
            weights = {_LAYER.sub("layers.0", name): self._file.get_tensor(name) for name in self._names[number]}
            save_file(weights, Path(folder) / contract.WEIGHTS, metadata={"format": "pt"})
            return PeftModel.from_pretrained(layer, folder).eval()

    def check_all_used(self) -> None:
        """Refuses an adapter of layers that the base does not have."""
        if self._unused:
            raise MixfuseError(
                f"{self._folder}: it has weights for layer {min(self._unused)}, which the base does not have",
                kind="adapter",
            )

    def _config_of(self, number: int) -> dict[str, Any]:
        """The config for the model of one layer: names of it are of layer 0 there, names of others are left out."""

        def here(name: str) -> str | None:
            found = _LAYER.search(name)
            return _LAYER.sub("layers.0", name) if found is None or int(found[1]) == number else None

        changed: dict[str, Any] = {}
        for key in ("target_modules", "target_parameters"):
            if isinstance(self._config.get(key), list):
                changed[key] = [name for entry in self._config[key] if (name := here(entry)) is not None]
        for key in ("rank_pattern", "alpha_pattern"):
            entries = self._config.get(key) or {}
            changed[key] = {name: value for entry, value in entries.items() if (name := here(entry)) is not None}
        return {**self._config, **changed, "layers_to_transform": None, "layers_pattern": None}
