"""What a Mixtral and one training step on it take, as formulas: parameters, activations, the moments of a step.

Pure functions over named symbols; `docs/planning.md` explains each and `benchmarks/plan.py` compares them with what
real processes hold.

Symbols: L layers, H hidden, I intermediate, E experts, K experts a token, A query heads, G key heads, D head size, V
vocabulary, r LoRA rank, N processes, B sequences a pass, S tokens a sequence, T = B·S, w bytes of an element.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mixfuse.contracts.family import Shape
from mixfuse.train.planning.zero3_gathers import Gathered, Module, Parameter, Visit
from mixfuse.train.recipe import Lora

FP32 = 4
INT64 = 8
# TRL 1.16, `trl/trainer/utils.py` and `trl/kernels/chunked_logprob.py`: the output layer is computed tile by tile.
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768
RNG_STATE = 5056  # bytes of torch.get_rng_state(), which a checkpointed layer keeps


class Batch(NamedTuple):
    """One forward pass on one process: B sequences of S tokens."""

    B: int
    S: int

    @property
    def T(self) -> int:  # noqa: N802 - the symbol
        """Tokens."""
        return self.B * self.S


# ---------------------------------------------------------------------------------------------------- parameters


def moe_block_parameters(shape: Shape) -> int:
    """3·E·H·I + E·H: what ZeRO-3 gathers at once, a MoE block being one leaf."""
    return 3 * shape.E * shape.H * shape.I + shape.E * shape.H


def modules(shape: Shape, lora: Lora) -> list[list[Module]]:
    """Every hooked module with parameters, in the order of a forward pass: top, embedding, each layer, last norm.

    The output layer's weight is used by the whole model, not by the module that owns it (TRL's fused head), so
    DeepSpeed registers it as external there.
    """
    L, H, I, E, _, A, G, D, V, *_ = shape  # noqa: N806, E741
    chosen = lora.chosen(L, E)
    widths = {"q_proj": (H, A * D), "k_proj": (H, G * D), "v_proj": (H, G * D), "o_proj": (A * D, H)}
    embedding = Parameter("embed_tokens", V * H, external=shape.tied)
    head = embedding if shape.tied else Parameter("lm_head", V * H, external=True)
    groups = [
        [Module("causal_lm", (head,), beneath=(head,))],
        [Module("embed_tokens", (embedding,), beneath=(embedding,))],
    ]
    for layer in range(L):
        name = f"layers.{layer}"
        group = [_module(f"{name}.input_layernorm", H)]
        for projection, (wide_in, wide_out) in widths.items():
            stem = f"{name}.self_attn.{projection}"
            group.append(_module(f"{stem}.base", wide_in * wide_out))
            if lora.attention:
                group.append(_module(f"{stem}.lora_A", lora.r * wide_in, trainable=True))
                group.append(_module(f"{stem}.lora_B", lora.r * wide_out, trainable=True))
        if shape.qk_norm:
            group += [_module(f"{name}.self_attn.{norm}", D) for norm in ("q_norm", "k_norm")]
        group.append(_module(f"{name}.post_attention_layernorm", H))
        inside = [
            Parameter(f"{name}.mlp.gate", E * H),
            Parameter(f"{name}.mlp.gate_up", E * 2 * I * H),
            Parameter(f"{name}.mlp.down", E * H * I),
        ]
        if ranks := lora.r * len(chosen[layer]):
            factors = {"gate_up.A": H, "gate_up.B": 2 * I, "down.A": I, "down.B": H}
            inside += [Parameter(f"{name}.mlp.{key}", ranks * width, True) for key, width in factors.items()]
        group.append(Module(f"{name}.mlp", tuple(inside), leaf=True, beneath=tuple(inside)))
        groups.append(group)
    groups.append([_module("norm", H)])
    return groups


def _module(name: str, numel: int, *, trainable: bool = False) -> Module:
    parameter = (Parameter(name, numel, trainable),)
    return Module(name, parameter, beneath=parameter)


def all_parameters(groups: Sequence[Sequence[Module]]) -> list[Parameter]:
    """Every parameter once."""
    return list(dict.fromkeys(parameter for group in groups for module in group for parameter in module.own))


def visits(groups: Sequence[Sequence[Module]], *, checkpointing: bool) -> list[Visit]:
    """The order in which DeepSpeed's hooks see the modules in one micro step.

    Containers take part: they gather nothing, but each is a step, and how far a MoE block's next use is, is counted
    over all that lies beneath the modules between.
    """
    (causal,), embed, *layers, norm = groups
    inner = tuple(p for group in groups[1:] for module in group for p in module.beneath)
    everything = tuple(dict.fromkeys((*inner, *causal.own)))
    causal = replace(causal, beneath=everything)
    outermost, peft, body = (
        Module("peft", beneath=everything),
        Module("lora", beneath=everything),
        Module("model", beneath=inner),
    )
    top = [outermost, peft, causal, body]

    def forward(number: int, group: Sequence[Module], phase: str) -> Iterator[Visit]:
        beneath = tuple(p for module in group for p in module.beneath)
        attention = tuple(p for module in group[1:-2] for p in module.beneath)
        yield Visit(Module(f"layers.{number}", beneath=beneath), phase)
        yield Visit(group[0], phase)
        yield Visit(Module(f"layers.{number}.self_attn", beneath=attention), phase)
        for module in group[1:]:
            if module.name.endswith(".base"):
                yield Visit(Module(module.name.removesuffix(".base"), beneath=module.beneath), phase)
            yield Visit(module, phase)
            if module.name.endswith(".base"):
                yield Visit(Module(f"{module.name}.dropout"), phase)

    def backward(number: int, group: Sequence[Module]) -> Iterator[Visit]:
        first = not checkpointing and number == 0  # its inputs need no gradient, so these hooks do not fire
        beneath = tuple(p for module in group for p in module.beneath)
        yield Visit(Module(f"layers.{number}", beneath=beneath), "backward")
        yield Visit(group[-1], "backward")
        if checkpointing:  # the block's backward pass asks for the first tensor that was not kept
            yield from forward(number, group, "recompute")
        yield Visit(group[-2], "backward")
        attention = [module for module in group[1:-2]]
        yield Visit(
            Module(f"layers.{number}.self_attn", beneath=tuple(p for m in attention for p in m.beneath)), "backward"
        )
        for projection in ("o_proj", "v_proj", "k_proj", "q_proj"):
            parts = [module for module in attention if f".{projection}." in module.name]
            yield Visit(Module(projection, beneath=tuple(p for m in parts for p in m.beneath)), "backward")
            for module in reversed(parts):
                if module.name.endswith(".base"):
                    if first and projection != "o_proj":
                        continue
                    yield Visit(Module(f"{module.name}.dropout"), "backward")
                yield Visit(module, "backward")
        if not first:
            yield Visit(group[0], "backward")

    order = [Visit(module, "forward") for module in (*top, *embed, Module("rotary_emb"))]
    for number, group in enumerate(layers):
        order += forward(number, group, "forward")
    order.append(Visit(norm[0], "forward"))
    down = [*(module for module in top[:3] for _ in range(2)), *[body] * 4]
    order += [Visit(module, "backward") for module in (*down, *norm)]
    for number in reversed(range(len(layers))):
        order += backward(number, layers[number])
    if checkpointing:
        order.append(Visit(embed[0], "backward"))
    return order


# --------------------------------------------------------------------------------------------------- activations


def attention_saved(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """What a layer's attention keeps for backward: norm, LoRA's inputs, q, k and v as heads, output, mask.

    w·(T·H + 4·T·r + 4·T·A·D + B·S²) + 4·(T·A + T) + [w = 2] 4·T·H; keys and values are repeated to A heads, and the
    padding mask becomes one of w bytes in every layer (transformers 5.19 `sdpa_attention_forward`). The norm keeps its
    input in float32. Dropout keeps, of each projection's input, what it let through and a mask of one byte; on a CPU
    the mask is of w bytes.
    """
    _, H, _, _, _, A, G, D, *_ = shape  # noqa: N806
    T = batch.T  # noqa: N806
    inputs = 0
    if lora.attention:
        inputs = w * (T * H + 4 * T * lora.r)  # the normed input; attention's output is kept anyhow
        if lora.dropout:
            inputs = w * 4 * T * lora.r + (w + (1 if cuda else w)) * T * (3 * H + A * D)
    norm = FP32 * T + (FP32 * T * H if w < FP32 else 0)
    heads = w * (4 * T * A * D + batch.B * batch.S**2) + FP32 * T * A
    qk_norms = FP32 * T * (A + G) * (D + 1) if shape.qk_norm else 0
    return inputs + norm + heads + qk_norms


def moe_saved(shape: Shape, batch: Batch, w: int, lora: Lora) -> int:
    """What a MoE block and the norm before it keep: x, the experts' first products, LoRA's, the routing.

    w·(T·H + T·K·(2I + 2r)) + 4·T·H + routing, with gate weights in float32; `train/model/expert_lora.py` saves the
    product before the activation function and nothing after.
    """
    _, H, I, E, K, *_ = shape  # noqa: N806, E741
    T = batch.T  # noqa: N806
    ranks = 2 * lora.r if lora.experts != "none" else 0
    routing = T * E * FP32 + T * K * (2 * INT64 + 2 * FP32) + T * FP32 + E * FP32
    return w * (T * H + T * K * (2 * I + ranks)) + FP32 * (T * H + T) + routing


def _rows(shape: Shape, batch: Batch, *, cuda: bool) -> int:
    """Token-expert pairs that are computed at once: all T·K on a GPU, else one expert's, taken as T·K/E."""
    pairs = batch.T * shape.K
    return pairs if cuda else -(-pairs // shape.E)


def moe_forward_workspace(shape: Shape, batch: Batch, w: int, *, cuda: bool) -> int:
    """w·n·(2I + H): the activation function's value, its product with the other half, and x by token-expert pair."""
    return w * _rows(shape, batch, cuda=cuda) * (2 * shape.I + shape.H) + w * batch.T * shape.H


def moe_backward_workspace(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """w·(n·max(6I + H, 5I + 3H) + 2·T·H) and LoRA's matrices and gradients, 3·r·E·(2H + 3I)·w.

    Of the n pairs that are computed at once: the gradient of their output, the activation and its product, the gradient
    of that, of both halves together and of the activation's input. For all tokens: the gradient that comes in and the
    sum that goes out. LoRA's B is copied so that each expert's lies dense, its gradients are collected and stacked.
    Expert by expert, on a CPU, one expert's gradient of both halves is still there when the next one's is made: 7I + H.
    """
    _, H, I, E, *_ = shape  # noqa: N806, E741
    rows = _rows(shape, batch, cuda=cuda)
    each = max(6 * I + H, 5 * I + 3 * H) if cuda else 7 * I + H
    factors = 0 if lora.experts == "none" else lora.r * E * 3 * (2 * H + 3 * I)
    return w * (rows * each + 2 * batch.T * H + factors)


def layer_saved(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """Attention's and the MoE block's."""
    return attention_saved(shape, batch, w, lora, cuda=cuda) + moe_saved(shape, batch, w, lora)


def checkpoint_saved(shape: Shape, batch: Batch, w: int) -> int:
    """T·H·w + 5056: a checkpointed layer keeps its input and the state of the random generator."""
    return batch.T * shape.H * w + RNG_STATE


def final_saved(shape: Shape, batch: Batch, w: int) -> int:
    """The last norm's and the output layer's input; cosines and sines of the positions."""
    T, H, D = batch.T, shape.H, shape.D  # noqa: N806
    return (FP32 + 2 * w) * T * H + FP32 * T + 2 * w * batch.S * D + batch.B * batch.S**2


def final_body(shape: Shape, batch: Batch, w: int) -> int:
    """Of these, what is there when the last norm has run: its input and output, cosines and sines, the padding mask."""
    T, H = batch.T, shape.H  # noqa: N806
    return (FP32 + w) * T * H + FP32 * T + 2 * w * batch.S * shape.D + batch.B * batch.S**2


def head_workspace(shape: Shape, batch: Batch, w: int, *, cuda: bool) -> int:
    """The output layer's backward pass: one tile of logits, and the gradient of its input in float32.

    w·min(T, 4096)·32768 + (4 + w)·T·H. torch's own tile operations on a CPU hold seven and a quarter float32 copies of
    the tile's used columns beside it.
    """
    rows = min(batch.T, HEAD_TOKENS)
    tile = w * rows * HEAD_COLUMNS
    if not cuda:
        tile += int(7.25 * FP32 * rows * min(shape.V, HEAD_COLUMNS))
    return tile + (FP32 + w) * batch.T * shape.H


def router_loss(shape: Shape, batch: Batch) -> int:
    """L·T·(16·K·E + 8·E): the load-balancing loss holds every layer's choices one-hot, masked and as float."""
    return shape.L * batch.T * (16 * shape.K * shape.E + 2 * FP32 * shape.E)


# ---------------------------------------------------------------------------------------------------------- a step


class Moment(NamedTuple):
    """One point of a step, on one process, in bytes beyond what is held throughout.

    Attributes:
        name: What happens.
        gathered: Parameters gathered for it.
        activations: Tensors kept for backward.
        workspace: Tensors that live for this moment.
    """

    name: str
    gathered: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All three."""
        return self.gathered + self.activations + self.workspace


def moments(
    shape: Shape,
    batch: Batch,
    w: int,
    lora: Lora,
    *,
    replayed: Sequence[Gathered],
    checkpointing: bool,
    cuda: bool,
    aux_loss: bool,
) -> Iterator[Moment]:
    """Every module's turn in one micro step, gathered parameters and activations side by side.

    Args:
        shape: The base's sizes.
        batch: One forward pass.
        w: Bytes of an element.
        lora: What is trained.
        replayed: What ZeRO-3 holds, turn by turn.
        checkpointing: Whether layers keep their input only.
        cuda: Whose kernels run.
        aux_loss: Whether the router's load-balancing loss is computed.
    """
    attention = attention_saved(shape, batch, w, lora, cuda=cuda)
    layer = layer_saved(shape, batch, w, lora, cuda=cuda)
    kept = checkpoint_saved(shape, batch, w) if checkpointing else layer
    gradient = batch.T * shape.H * w
    attention_workspace = w * batch.T * (4 * shape.A * shape.D + 2 * shape.H)
    forward_workspace = moe_forward_workspace(shape, batch, w, cuda=cuda)
    backward_workspace = moe_backward_workspace(shape, batch, w, lora, cuda=cuda)
    routers = router_loss(shape, batch) if aux_loss else 0
    before_head = 0
    for (module, phase), fetching, running, _ in replayed:
        name = module.name
        if phase == "forward":
            before_head = running * w
        if not name.startswith("layers."):
            continue
        done = int(name.split(".")[1]) * kept  # of the layers before this one
        if phase != "forward" and checkpointing:
            done += kept
        if name.endswith(".mlp"):
            if phase == "forward":
                inside = 0 if checkpointing else attention
                yield Moment(f"{name}: gather, forward", fetching * w, done + inside, gradient)
                yield Moment(f"{name}: forward", running * w, done + (0 if checkpointing else layer), forward_workspace)
            elif phase == "backward":
                yield Moment(
                    f"{name}: gather, backward", fetching * w, done + (0 if checkpointing else layer), gradient
                )
            if phase == ("recompute" if checkpointing else "backward"):
                # In float32 the checkpoint is the very tensor that the layer's first norm keeps.
                again = layer - (gradient if checkpointing and w == FP32 else 0)
                yield Moment(f"{name}: backward", running * w, done + again, max(backward_workspace, forward_workspace))
        else:
            inside = 0 if phase == "forward" and checkpointing else attention
            yield Moment(f"{name}: {phase}", max(fetching, running) * w, done + inside, attention_workspace)
    yield Moment(
        "output layer and loss",
        before_head,
        shape.L * kept + final_saved(shape, batch, w) + routers,
        head_workspace(shape, batch, w, cuda=cuda),
    )
