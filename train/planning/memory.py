"""Formulas for the memory of one training step: parameters, activations, and each moment of the step.

The functions are pure and use named symbols. `docs/planning.md` explains each formula, and `benchmarks/plan.py`
compares the results with what real processes hold.

Symbols: L layers, H hidden, I intermediate, E experts, K experts per token, A query heads, G key heads, D head size, V
vocabulary, r LoRA rank, N processes, B sequences per pass, S tokens per sequence, C processes that divide them, T =
B·S/C, w bytes per element.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mixfuse.contracts.family import Shape
from mixfuse.train.planning.zero3_gathers import Gathered, Module, Parameter, Visit
from mixfuse.train.quantization import LOOKED_UP_BYTES, WEIGHTS_AT_ONCE, Experts
from mixfuse.train.recipe import Lora

PLAIN = Experts()
FP32 = 4
INT64 = 8
# TRL 1.16, `trl/trainer/utils.py` and `trl/kernels/chunked_logprob.py`: the output layer is computed tile by tile.
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768
HEAD_ROWS = 4096  # of the output layer's weight, in float32 at a time: `train/stages/one_pass_dpo.py`
RNG_STATE = 5056  # bytes of torch.get_rng_state(), which a checkpointed layer saves


class Batch(NamedTuple):
    """One forward pass: B sequences of S tokens, which C processes divide (`parallel.sequences`)."""

    B: int
    S: int
    C: int = 1

    @property
    def T(self) -> int:  # noqa: N802 - the symbol
        """Tokens on one process."""
        return -(-self.B * self.S // self.C)

    @property
    def mask(self) -> int:
        """Elements of a padding mask; divided sequences have none."""
        return self.B * self.S**2 if self.C == 1 else 0

    @property
    def positions(self) -> int:
        """Positions whose cosines and sines are kept; divided sequences are concatenated."""
        return self.S if self.C == 1 else self.T


class MicroStep(NamedTuple):
    """What one process computes in one micro step.

    Attributes:
        shape: Sizes of the base.
        batch: The forward pass.
        w: Bytes per element.
        lora: What is trained.
        checkpointing: Whether a layer saves only its input for backward.
        cuda: Whether CUDA's kernels run, or torch's on a CPU.
        aux_loss: Whether the router's load-balancing loss is computed.
        one_pass: Whether the output layer runs on the prompts' last positions alone (`train/stages/one_pass_dpo.py`).
        experts: How the frozen experts are held.
    """

    shape: Shape
    batch: Batch
    w: int
    lora: Lora
    checkpointing: bool
    cuda: bool
    aux_loss: bool
    one_pass: bool = False
    experts: Experts = PLAIN


# ---------------------------------------------------------------------------------------------------- parameters


def moe_block_parameters(shape: Shape, experts: Experts = PLAIN) -> int:
    """3·E·H·I + E·H. ZeRO-3 gathers them at once, because a MoE block is one leaf.

    Of quantised experts, what is counted is the elements that hold their codes and scales (`train/quantization.py`).
    """
    return sum(experts.elements(3 * shape.E * shape.H * shape.I).values()) + shape.E * shape.H


def layer_parameters(shape: Shape, lora: Lora, experts: Experts = PLAIN) -> int:
    """Parameters of the layer that has most, with its LoRA."""
    _, _, *layers, _ = modules(shape, lora, experts)
    return max(sum(parameter.numel for module in group for parameter in module.own) for group in layers)


def modules(shape: Shape, lora: Lora, experts: Experts = PLAIN, *, one_pass: bool = False) -> list[list[Module]]:
    """Lists the hooked modules that own parameters, in the order of a forward pass.

    TRL's fused head uses the output layer's weight in the whole model's forward pass, not in the module that owns it.
    DeepSpeed therefore registers the weight as external to the whole model. A judge's pass runs the output layer as a
    module of its own, behind the last norm (`one_pass`).

    Returns:
        One group each for the whole model and the embedding, one for each layer, one for the last norm and what is
        behind it.
    """
    L, H, I, E, _, A, G, D, V, *_ = shape  # noqa: N806, E741
    chosen = lora.chosen(L, E)
    widths = {"q_proj": (H, A * D), "k_proj": (H, G * D), "v_proj": (H, G * D), "o_proj": (A * D, H)}
    embedding = Parameter("embed_tokens", V * H, external=shape.tied)
    head = embedding if shape.tied else Parameter("lm_head", V * H, external=not one_pass)
    groups = [
        [Module("causal_lm", () if one_pass else (head,), beneath=(head,))],
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
        inside = [Parameter(f"{name}.mlp.gate", E * H)]
        for key, weights in {"gate_up": E * 2 * I * H, "down": E * H * I}.items():
            held = experts.elements(weights).items()
            inside += [Parameter(f"{name}.mlp.{key}{suffix}", elements) for suffix, elements in held]
        if ranks := lora.r * len(chosen[layer]):
            factors = {"gate_up.A": H, "gate_up.B": 2 * I, "down.A": I, "down.B": H}
            inside += [Parameter(f"{name}.mlp.{key}", ranks * width, True) for key, width in factors.items()]
        group.append(Module(f"{name}.mlp", tuple(inside), leaf=True, beneath=tuple(inside)))
        groups.append(group)
    groups.append([_module("norm", H), *([Module("lm_head", (head,), beneath=(head,))] if one_pass else [])])
    return groups


def _module(name: str, numel: int, *, trainable: bool = False) -> Module:
    parameter = (Parameter(name, numel, trainable),)
    return Module(name, parameter, beneath=parameter)


def all_parameters(groups: Sequence[Sequence[Module]]) -> list[Parameter]:
    """Lists every parameter once."""
    return list(dict.fromkeys(parameter for group in groups for module in group for parameter in module.own))


def visits(groups: Sequence[Sequence[Module]], *, checkpointing: bool) -> list[Visit]:
    """Lists the modules in the order in which DeepSpeed's hooks see them in one micro step.

    Containers are part of the order although they gather nothing. Each is a step, and DeepSpeed measures the distance
    to a MoE block's next use over all parameters beneath the modules in between.

    Args:
        groups: The result of `modules`.
        checkpointing: Whether a layer's forward pass is repeated in the backward pass.
    """
    (causal,), embed, *layers, (norm, *head) = groups
    inner = _beneath(module for group in (embed, *layers, [norm]) for module in group)
    everything = tuple(dict.fromkeys((*inner, *causal.beneath)))
    causal = replace(causal, beneath=everything)
    body = Module("model", beneath=inner)
    top = [Module("peft", beneath=everything), Module("lora", beneath=everything), causal, body]

    order = [Visit(module, "forward") for module in (*top, *embed, Module("rotary_emb"))]
    for number, group in enumerate(layers):
        order += _layer_forward(number, group, "forward")
    order += [Visit(module, "forward") for module in (norm, *head)]
    down = [*(module for module in top[:3] for _ in range(2)), *head, *[body] * 4]
    order += [Visit(module, "backward") for module in (*down, norm)]
    for number in reversed(range(len(layers))):
        order += _layer_backward(number, layers[number], checkpointing=checkpointing)
    if checkpointing:
        order.append(Visit(embed[0], "backward"))
    return order


def _layer_forward(number: int, group: Sequence[Module], phase: str) -> Iterator[Visit]:
    yield Visit(Module(f"layers.{number}", beneath=_beneath(group)), phase)
    yield Visit(group[0], phase)
    yield Visit(Module(f"layers.{number}.self_attn", beneath=_beneath(group[1:-2])), phase)
    for module in group[1:]:
        if module.name.endswith(".base"):
            yield Visit(Module(module.name.removesuffix(".base"), beneath=module.beneath), phase)
        yield Visit(module, phase)
        if module.name.endswith(".base"):
            yield Visit(Module(f"{module.name}.dropout"), phase)


def _layer_backward(number: int, group: Sequence[Module], *, checkpointing: bool) -> Iterator[Visit]:
    # The first layer's inputs need no gradient, so the backward hooks of these modules do not fire.
    without_input_gradient = not checkpointing and number == 0
    yield Visit(Module(f"layers.{number}", beneath=_beneath(group)), "backward")
    yield Visit(group[-1], "backward")
    if checkpointing:  # the block's backward pass asks for the first tensor that was not saved
        yield from _layer_forward(number, group, "recompute")
    yield Visit(group[-2], "backward")
    attention = group[1:-2]
    yield Visit(Module(f"layers.{number}.self_attn", beneath=_beneath(attention)), "backward")
    for projection in ("o_proj", "v_proj", "k_proj", "q_proj"):
        parts = [module for module in attention if f".{projection}." in module.name]
        yield Visit(Module(projection, beneath=_beneath(parts)), "backward")
        for module in reversed(parts):
            if module.name.endswith(".base"):
                if without_input_gradient and projection != "o_proj":
                    continue
                yield Visit(Module(f"{module.name}.dropout"), "backward")
            yield Visit(module, "backward")
    if not without_input_gradient:
        yield Visit(group[0], "backward")


def _beneath(modules: Iterable[Module]) -> tuple[Parameter, ...]:
    return tuple(parameter for module in modules for parameter in module.beneath)


# --------------------------------------------------------------------------------------------------- activations


def attention_saved(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """Bytes that a layer's attention saves for backward: norm, LoRA's inputs, q, k and v as heads, output, mask.

    w·(T·H + 4·T·r + 4·T·A·D + B·S²) + 4·(T·A + T) + [w = 2] 4·T·H, and 4·T·(A + G)·(D + 1) where queries and keys are
    normalised. Keys and values are repeated to A heads, and every layer makes a padding mask with w bytes per element
    (transformers 5.19 `sdpa_attention_forward`). A norm saves its input in float32. Dropout saves its output and a mask
    for each projection; the mask has one byte per element on a GPU and w on a CPU. Divided sequences have no mask;
    the exchange's output is another tensor than attention's: w·T·A·D more.
    """
    _, H, _, _, _, A, G, D, *_ = shape  # noqa: N806
    T = batch.T  # noqa: N806
    inputs = 0
    if lora.attention:
        inputs = w * (T * H + 4 * T * lora.r)  # the normalised input; attention's output is counted in `heads`
        if lora.dropout:
            inputs = w * 4 * T * lora.r + (w + (1 if cuda else w)) * T * (3 * H + A * D)
    norm = FP32 * T + (FP32 * T * H if w < FP32 else 0)
    heads = w * ((4 if batch.C == 1 else 5) * T * A * D + batch.mask) + FP32 * T * A
    qk_norms = FP32 * T * (A + G) * (D + 1) if shape.qk_norm else 0
    return inputs + norm + heads + qk_norms


def moe_saved(shape: Shape, batch: Batch, w: int, lora: Lora) -> int:
    """Bytes that a MoE block and the norm before it save: x, the experts' first products, LoRA's products, the routing.

    w·(T·H + T·K·(2I + 2r)) + 4·T·H + routing, with gate weights in float32. `train/model/expert_products.py` saves the
    input of the activation function, not its output.
    """
    _, H, I, E, K, *_ = shape  # noqa: N806, E741
    T = batch.T  # noqa: N806
    ranks = 2 * lora.r if lora.experts != "none" else 0
    routing = T * E * FP32 + T * K * (2 * INT64 + 2 * FP32) + T * FP32 + E * FP32
    return w * (T * H + T * K * (2 * I + ranks)) + FP32 * (T * H + T) + routing


def exchanged(shape: Shape, batch: Batch, w: int) -> int:
    """w·T·D·(2A + 2·max(G, C)): queries, keys, values and output, exchanged by each layer of a pass; 0 undivided.

    (C-1)/C of it crosses to other processes. With fewer key heads than processes, each is sent several times.
    """
    if batch.C == 1:
        return 0
    return w * batch.T * shape.D * 2 * (shape.A + max(shape.G, batch.C))


def _rows(shape: Shape, batch: Batch, *, cuda: bool) -> int:
    """Token-expert pairs that are computed at once: all T·K on a GPU; one expert's on a CPU, taken as T·K/E."""
    pairs = batch.T * shape.K
    return pairs if cuda else -(-pairs // shape.E)


def moe_forward_workspace(shape: Shape, batch: Batch, w: int, *, cuda: bool) -> int:
    """w·n·(2I + H) + w·T·H: for each of n pairs the activation's output, its product with `up`, and x; and the sum."""
    return w * _rows(shape, batch, cuda=cuda) * (2 * shape.I + shape.H) + w * batch.T * shape.H


def moe_backward_workspace(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """w·(n·max(6I + H, 5I + 3H) + 2·T·H) and LoRA's matrices and gradients, 3·r·E·(2H + 3I)·w.

    For each of the n pairs computed at once, these exist: the gradient of the output, the activation and its product
    with `up`, the gradient of that product, of gate and up together, and of the activation's input. For all tokens: the
    incoming gradient and the sum of the outgoing one. LoRA's B is copied so that each expert's matrix is contiguous;
    its gradients are collected and stacked. A CPU goes expert by expert, and one expert's gradient of gate and up still
    exists when the next expert's is made: 7I + H.
    """
    _, H, I, E, *_ = shape  # noqa: N806, E741
    rows = _rows(shape, batch, cuda=cuda)
    each = max(6 * I + H, 5 * I + 3 * H) if cuda else 7 * I + H
    factors = 0 if lora.experts == "none" else lora.r * E * 3 * (2 * H + 3 * I)
    return w * (rows * each + 2 * batch.T * H + factors)


def unpacked(step: MicroStep) -> int:
    """Bytes of a projection's unpacked weights, w·2·E·I·H, on a CPU of one expert; and what unpacking takes besides.

    Unpacking goes by 2²⁴ weights. Looking NF4 up takes an int32 for each two of them, and their values once more; int8
    is converted on the way on a GPU, and to a copy on a CPU.
    """
    shape, w = step.shape, step.w
    if step.experts.quantization is None:
        return 0
    weights = (shape.E if step.cuda else 1) * 2 * shape.I * shape.H
    beside = LOOKED_UP_BYTES + w if step.experts.quantization == "nf4" else 0 if step.cuda else w
    return w * weights + beside * min(weights, WEIGHTS_AT_ONCE)


def layer_saved(shape: Shape, batch: Batch, w: int, lora: Lora, *, cuda: bool) -> int:
    """Bytes that a layer saves for backward: attention's and the MoE block's."""
    return attention_saved(shape, batch, w, lora, cuda=cuda) + moe_saved(shape, batch, w, lora)


def checkpoint_saved(shape: Shape, batch: Batch, w: int) -> int:
    """T·H·w + 5056: a checkpointed layer saves its input and the state of the random generator."""
    return batch.T * shape.H * w + RNG_STATE


def final_saved(shape: Shape, batch: Batch, w: int) -> int:
    """Bytes of the inputs of the last norm and the output layer, and of the positions' cosines and sines."""
    T, H, D = batch.T, shape.H, shape.D  # noqa: N806
    return (FP32 + 2 * w) * T * H + FP32 * T + 2 * w * batch.positions * D + batch.mask


def final_body(shape: Shape, batch: Batch, w: int) -> int:
    """The part of `final_saved` that exists after the last norm: its input and output, cosines and sines, the mask."""
    T, H = batch.T, shape.H  # noqa: N806
    return (FP32 + w) * T * H + FP32 * T + 2 * w * batch.positions * shape.D + batch.mask


def head_workspace(shape: Shape, batch: Batch, w: int, *, cuda: bool) -> int:
    """The output layer's backward pass: one tile of logits, and the gradient of its input in float32.

    w·min(T, 4096)·32768 + (4 + w)·T·H. On a CPU, torch's tile operations also hold 7.25 float32 copies of the tile's
    used columns.
    """
    rows = min(batch.T, HEAD_TOKENS)
    tile = w * rows * HEAD_COLUMNS
    if not cuda:
        tile += int(7.25 * FP32 * rows * min(shape.V, HEAD_COLUMNS))
    return tile + (FP32 + w) * batch.T * shape.H


def verdict_workspace(shape: Shape, batch: Batch, w: int) -> int:
    """The output layer on the last positions alone: logits in float32, a part of its weight, the gradient of its input.

    4·(2·B²·V + 5·B·V) + 4·min(V, 4096)·H + w·T·H: the layer runs on each distinct last position for each of B prompts.
    """
    logits = FP32 * batch.B * shape.V * (2 * batch.B + 5)
    return logits + FP32 * min(shape.V, HEAD_ROWS) * shape.H + w * batch.T * shape.H


def router_loss(shape: Shape, batch: Batch) -> int:
    """L·T·(16·K·E + 8·E): the load-balancing loss holds each layer's choices one-hot, masked, and as floats."""
    return shape.L * batch.T * (16 * shape.K * shape.E + 2 * FP32 * shape.E)


# ---------------------------------------------------------------------------------------------------------- a step


class Moment(NamedTuple):
    """One moment of a step on one process; bytes beyond those that are held during the whole run.

    Attributes:
        name: What the process computes.
        gathered: Gathered parameters.
        activations: Tensors saved for backward.
        workspace: Tensors that exist only in this moment.
    """

    name: str
    gathered: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.gathered + self.activations + self.workspace


def moments(step: MicroStep, gathers: Sequence[Gathered]) -> Iterator[Moment]:
    """Yields the moments of one micro step, with gathered parameters, activations and workspace side by side.

    Args:
        step: What is computed.
        gathers: What ZeRO-3 holds gathered around each visit (`zero3_gathers.replay`).
    """
    shape, batch, w, lora, checkpointing, cuda, aux_loss, one_pass, _ = step
    attention = attention_saved(shape, batch, w, lora, cuda=cuda)
    layer = layer_saved(shape, batch, w, lora, cuda=cuda)
    per_layer = checkpoint_saved(shape, batch, w) if checkpointing else layer
    attention_workspace = w * batch.T * (4 * shape.A * shape.D + 2 * shape.H) + 2 * exchanged(shape, batch, w)
    before_head = 0
    for visit, fetching, running, _ in gathers:
        name, phase = visit.module.name, visit.phase
        if phase == "forward":
            before_head = running * w
        if not name.startswith("layers."):
            continue
        saved = int(name.split(".")[1]) * per_layer  # by the layers before this one
        if phase != "forward" and checkpointing:
            saved += per_layer
        if name.endswith(".mlp"):
            yield from _moe_moments(step, name, phase, (fetching * w, running * w), saved)
        else:
            inside = 0 if phase == "forward" and checkpointing else attention
            yield Moment(f"{name}: {phase}", max(fetching, running) * w, saved + inside, attention_workspace)
    end = final_body(shape, batch, w) if one_pass else final_saved(shape, batch, w)
    yield Moment(
        "output layer and loss",
        before_head,
        shape.L * per_layer + end + (router_loss(shape, batch) if aux_loss else 0),
        verdict_workspace(shape, batch, w) if one_pass else head_workspace(shape, batch, w, cuda=cuda),
    )


def without_gradients(name: str, step: MicroStep, gathers: Sequence[Gathered]) -> Moment:
    """The moment of a forward pass without gradients that needs most: a MoE block runs, and nothing is kept but x.

    w·(n·(4I + H) + 3·T·H) + 4·T·H + B·S²: beyond `moe_forward_workspace` the experts' first products, the residual, the
    norm's output and its float32 copy, and the mask.

    Args:
        name: What the pass is for.
        step: What is computed; `checkpointing` does not matter.
        gathers: What ZeRO-3 holds gathered around each visit of a step.
    """
    shape, batch, w, cuda = step.shape, step.batch, step.w, step.cuda
    first_products = w * _rows(shape, batch, cuda=cuda) * 2 * shape.I
    others = (2 * w + FP32) * batch.T * shape.H + batch.mask
    workspace = moe_forward_workspace(shape, batch, w, cuda=cuda) + first_products + others + unpacked(step)
    running = max((g.running for g in gathers if g.visit.phase == "forward"), default=0)
    return Moment(name, running * w, 0, workspace)


def _moe_moments(step: MicroStep, name: str, phase: str, gathered: tuple[int, int], saved: int) -> Iterator[Moment]:
    """Yields the moments of one visit to a MoE block.

    Args:
        step: What is computed.
        name: The block's name.
        phase: The visit's phase.
        gathered: Bytes while the block is fetched, and while it runs.
        saved: Bytes of activations from before this layer.
    """
    shape, batch, w, lora = step.shape, step.batch, step.w, step.lora
    checkpointing, cuda = step.checkpointing, step.cuda
    weights = unpacked(step)
    fetching, running = gathered
    layer = layer_saved(shape, batch, w, lora, cuda=cuda)
    gradient = batch.T * shape.H * w
    forward_workspace = moe_forward_workspace(shape, batch, w, cuda=cuda)
    if phase == "forward":
        attention = attention_saved(shape, batch, w, lora, cuda=cuda)
        yield Moment(f"{name}: gather, forward", fetching, saved + (0 if checkpointing else attention), gradient)
        kept = 0 if checkpointing else layer
        yield Moment(f"{name}: forward", running, saved + kept, forward_workspace + weights)
    elif phase == "backward":
        yield Moment(f"{name}: gather, backward", fetching, saved + (0 if checkpointing else layer), gradient)
    if phase == ("recompute" if checkpointing else "backward"):
        # In float32 the checkpoint is the same tensor that the layer's first norm saves.
        recomputed = layer - (gradient if checkpointing and w == FP32 else 0)
        workspace = max(moe_backward_workspace(shape, batch, w, lora, cuda=cuda), forward_workspace)
        yield Moment(f"{name}: backward", running, saved + recomputed, workspace + weights)
