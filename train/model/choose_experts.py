"""Chooses the experts that get a LoRA: all, those that the recipe names, or those that the domain's data is routed to.

For `lora.experts: auto` the base is run over a sample of the data, and the outputs of its routers are recorded: how
often each expert is among a token's top K, and how much gate weight it gets. In each layer, the fewest experts that
have `lora.expert_share` of the gate weight are adapted. This is Expert-Specialized Fine-Tuning with the average gate
score as relevance (ESFT-Gate, arXiv 2407.01906, section 3.3). The choice is made once per run and is the same on every
process. The run's `experts.json` records it, and a resumed run reads it from there.

Dimensions in names: L layers, E experts, T tokens, K experts per token.
"""

# ruff: noqa: N803, N806 - tensors are named with their dimensions

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.families import shape_of
from mixfuse.contracts.files import read_json, write_json
from mixfuse.train.model.family_classes import block_classes, router_classes
from mixfuse.train.processes import worker
from mixfuse.train.recipe import TrainRecipe, lora_parameters

RECORD = "experts.json"
Chosen = tuple[tuple[int, ...], ...]
"""For each layer, the experts that get a LoRA, ascending."""


class Load(NamedTuple):
    """How the routers distributed a sample over the experts.

    Attributes:
        tokens: Tokens in the sample.
        gate_share: For each layer, each expert's share of the gate weight; a layer's sum is 1.
        token_share: For each layer, the share of the tokens that have the expert among their top K; a layer's sum is K.
    """

    tokens: int
    gate_share: tuple[tuple[float, ...], ...]
    token_share: tuple[tuple[float, ...], ...]


def choose_for_run(recipe: TrainRecipe, model: Any, rows: Sequence[Any], tokenizer: Any, *, resuming: bool) -> Chosen:
    """Chooses a run's experts before its model is wrapped. Every process of the run must call this.

    Args:
        recipe: The run's recipe.
        model: The base from `load_base`, partitioned or not.
        rows: The training data: rows with `input_ids`, or with `prompt` and `completion` or `chosen`.
        tokenizer: The base's tokenizer.
        resuming: Whether the run continues from a checkpoint. Its factors only fit the experts that were chosen first.

    Raises:
        MixfuseError: An expert that the recipe names does not exist, or the run to resume has no `experts.json`.
    """
    config = model.config
    if recipe.lora.experts != "auto":
        shape = shape_of(config.to_dict())
        return recipe.lora.chosen(shape.L, shape.E)
    is_first = _rank() == 0
    if resuming:
        if is_first and not (recipe.out / RECORD).is_file():
            raise MixfuseError(
                f"{recipe.out} holds a run to resume, but not its {RECORD}, so its experts are not known; "
                "remove the folder to start over"
            )
        return _from_first(tuple(map(tuple, read_json(recipe.out / RECORD)["chosen"])) if is_first else None)
    load = measure(model, sample(rows, tokenizer, recipe), micro_batch=recipe.optimizer.micro_batch)
    chosen = _from_first(choose(load, recipe.lora.expert_share) if is_first else None)
    if is_first:
        recipe.out.mkdir(parents=True, exist_ok=True)
        write_json(recipe.out / RECORD, describe(recipe, load, chosen, config))
        print(summary(load, chosen))
    return chosen


def choose(load: Load, share: float) -> Chosen:
    """Chooses, in each layer, the fewest experts that have `share` of the gate weight; for ties, the lower number."""
    chosen = []
    for shares in load.gate_share:
        selected: list[int] = []
        for expert in sorted(range(len(shares)), key=lambda number: (-shares[number], number)):
            # The sum of all shares may fall short of 1 by rounding.
            if sum(shares[number] for number in selected) >= share - 1e-6:
                break
            selected.append(expert)
        chosen.append(tuple(sorted(selected)))
    return tuple(chosen)


def sample(rows: Sequence[Any], tokenizer: Any, recipe: TrainRecipe) -> list[list[int]]:
    """Draws `lora.expert_sample` rows with the recipe's seed and returns their token ids, cut to `max_length`."""
    count = min(recipe.lora.expert_sample, len(rows))
    numbers = random.Random(recipe.seed).sample(range(len(rows)), count)  # noqa: S311 - reproducible, no secret
    drawn = []
    for number in sorted(numbers):
        row = rows[number]
        ids = row["input_ids"] if "input_ids" in row else [*row["prompt_ids"], *row["chosen_ids"]]
        drawn.append(list(ids)[: recipe.max_length])
    return drawn


def measure(model: Any, rows: Sequence[Sequence[int]], *, micro_batch: int) -> Load:
    """Runs the base over token ids and records how its routers distribute them. Each process takes a part of the rows.

    All processes make the same number of passes, because a pass over a partitioned model gathers its parameters.

    Args:
        model: A base model from `load_base`; a partitioned one is gathered block by block.
        rows: Token ids.
        micro_batch: Rows per pass.
    """
    rank, world = _rank(), _world()
    ordered = sorted(rows, key=len)  # rows of similar length need little padding
    passes = -(-len(ordered) // (world * micro_batch))
    routers = [module for module in model.modules() if isinstance(module, router_classes())]
    device = worker.device()
    experts = shape_of(model.config.to_dict()).E
    gates_LE = torch.zeros(len(routers), experts, dtype=torch.float64, device=device)
    counts_LE = torch.zeros_like(gates_LE)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    is_token = torch.zeros(0, dtype=torch.bool)  # of the current pass; False for padding

    def record(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            _, weights_TK, index_TK = output
            weights, index = weights_TK[is_token].flatten().double(), index_TK[is_token].flatten()
            gates_LE[layer].index_add_(0, index, weights)
            counts_LE[layer].index_add_(0, index, torch.ones_like(weights))

        return hook

    was_training = model.training
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(model.train, was_training)
        model.eval()
        stack.enter_context(gathered_by_block(model))
        for layer, router in enumerate(routers):
            stack.callback(router.register_forward_hook(record(layer)).remove)
        for number in range(passes):
            start = (number * world + rank) * micro_batch
            batch = ordered[start : start + micro_batch]
            # A process that has no rows left runs one without counting it, so that all make the same passes.
            ids, mask = _padded(batch or ordered[:1], device)
            is_token = mask.bool().flatten() if batch else torch.zeros(ids.numel(), dtype=torch.bool, device=device)
            tokens += is_token.sum()
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    if world > 1:
        for tensor in (gates_LE, counts_LE, tokens):
            torch.distributed.all_reduce(tensor)
    return Load(
        tokens=int(tokens),
        gate_share=_nested(gates_LE / gates_LE.sum(1, keepdim=True)),
        token_share=_nested(counts_LE / tokens),
    )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows padded with zeros to equal length, and the attention mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, device=device)
        mask[place, : len(row)] = 1
    return ids, mask


def describe(recipe: TrainRecipe, load: Load, chosen: Chosen, config: Any) -> dict[str, Any]:
    """Returns the content of `experts.json`."""
    sizes = config.to_dict()
    return {
        "tokens": load.tokens,
        "expert_share": recipe.lora.expert_share,
        "chosen": [list(experts) for experts in chosen],
        "gate_share": [[round(share, 6) for share in shares] for shares in load.gate_share],
        "token_share": [[round(share, 6) for share in shares] for shares in load.token_share],
        "trainable_parameters": sum(map(sum, lora_parameters(sizes, recipe.lora, chosen))),
        "trainable_parameters_all_experts": sum(map(sum, lora_parameters(sizes, recipe.lora))),
    }


def summary(load: Load, chosen: Chosen) -> str:
    """Returns one line: how many experts were chosen, and how uneven the load is."""
    count, total = sum(map(len, chosen)), sum(map(len, load.gate_share))
    even, busiest = 1 / len(load.gate_share[0]), max(map(max, load.gate_share))
    hint = ""
    if busiest < 2 * even:
        hint = "; the load is almost even, so the router has not specialised and the choice means little"
    return (
        f"{count} of {total} experts have the gate weight that lora.expert_share asks for, over {load.tokens} tokens; "
        f"the busiest expert has {busiest:.0%} of its layer's gate weight, an even load would be {even:.0%}{hint}"
    )


@contextmanager
def gathered_by_block(model: Any) -> Iterator[None]:
    """Gathers a partitioned model's parameters around the forward pass of their module; a MoE block is gathered whole.

    DeepSpeed's engine does the same, but it does not exist before the model is wrapped.
    """
    from deepspeed.runtime.zero import GatheredParameters

    blocks = [module for module in model.modules() if isinstance(module, block_classes())]
    inside = {id(module) for block in blocks for module in block.modules()} - {id(block) for block in blocks}
    with ExitStack() as hooks:
        for module in model.modules():
            whole = isinstance(module, block_classes())
            parameters = [p for p in module.parameters(recurse=whole) if hasattr(p, "ds_id")]
            if not parameters or id(module) in inside:
                continue
            gathered = GatheredParameters(parameters)
            hooks.callback(module.register_forward_pre_hook(_enter(gathered)).remove)
            hooks.callback(module.register_forward_hook(_leave(gathered), always_call=True).remove)
        yield


def _enter(context: Any) -> Any:
    return lambda *_: context.__enter__() and None


def _leave(context: Any) -> Any:
    return lambda *_: context.__exit__(None, None, None)


def _nested(shares_LE: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in shares_LE.tolist())


def _from_first(value: Any) -> Chosen:
    """Broadcasts the value of process 0 to every process."""
    box = [value]
    if _world() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    chosen: Chosen = box[0]
    return chosen


def _rank() -> int:
    return int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0


def _world() -> int:
    return int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
