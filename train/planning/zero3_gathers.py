"""What ZeRO-3 holds gathered, step by step: DeepSpeed's parameter coordinator, replayed with numbers for tensors.

A parameter is gathered when its module runs, earlier where there is room (prefetch), and let go when its next use is
far away. Which of these makes the peak depends on the order of modules and on four thresholds, so the order is replayed
rather than summed up. Source: deepspeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py` (`fetch_sub_module`,
`release_sub_module`) and `partition_parameters.py` (`_all_gather_coalesced`). `benchmarks/plan.py` compares the replay
with what real processes hold.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One parameter.

    Attributes:
        name: Its name in the model.
        numel: Elements, whole.
        trainable: Whether it is part of the LoRA.
        external: Whether a module uses it that does not own it; once gathered it stays, to the end of the step.
    """

    name: str
    numel: int
    trainable: bool = False
    external: bool = False

    def per_rank(self, world_size: int) -> int:
        """Elements of its partition: ceil(n / N)."""
        return -(-self.numel // world_size)


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One module that DeepSpeed hooks.

    Attributes:
        name: Its name in the model.
        own: Its own parameters; of a leaf, all beneath it.
        leaf: A ZeRO-3 leaf module: gathered whole.
        beneath: All parameters in it, own ones included.
    """

    name: str
    own: tuple[Parameter, ...] = ()
    leaf: bool = False
    beneath: tuple[Parameter, ...] = ()


class Visit(NamedTuple):
    """One module's turn.

    Attributes:
        module: Which.
        phase: "forward", "recompute" or "backward".
    """

    module: Module
    phase: str


class Gathered(NamedTuple):
    """What is gathered around one visit, in elements; persistent parameters are not counted.

    Attributes:
        visit: Whose turn it is.
        fetching: The most while the module's parameters come in.
        running: While it runs.
        arriving: What is gathered now, for it or ahead.
    """

    visit: Visit
    fetching: int
    running: int
    arriving: int = 0


@dataclass(frozen=True)
class Thresholds:
    """DeepSpeed's settings, in elements.

    Attributes:
        prefetch: `stage3_prefetch_bucket_size`.
        persistence: `stage3_param_persistence_threshold`: what is no larger stays gathered.
        max_live: `stage3_max_live_parameters`: no prefetch beyond.
        max_reuse: `stage3_max_reuse_distance`: what is used again within is kept.
    """

    prefetch: int
    persistence: int
    max_live: int
    max_reuse: int


@dataclass(eq=False)
class _Flight:
    """One collective: parameters on their way, and the flat buffer they arrive in."""

    parameters: set[Parameter]
    buffer: int
    landed: bool = False


@dataclass
class _State:
    world_size: int
    held: dict[Parameter, int] = field(default_factory=dict)
    flights: dict[Parameter, _Flight] = field(default_factory=dict)
    buffers: int = 0
    peak: int = 0
    arrived: int = 0

    def now(self) -> int:
        return sum(self.held.values()) + self.buffers

    def note(self) -> None:
        self.peak = max(self.peak, self.now())


def replay(
    visits: Sequence[Visit], thresholds: Thresholds, world_size: int, *, recorded: bool = True
) -> list[Gathered]:
    """Replays one micro step.

    Args:
        visits: The modules in the order of their turns.
        thresholds: DeepSpeed's settings.
        world_size: Processes; with one nothing is gathered, parameters are used where they lie.
        recorded: Whether DeepSpeed knows the order from the step before. It does not for DPO, where forward passes of
            policy and reference alternate and each throws the other's record away: then nothing is prefetched or kept.

    Returns:
        One entry a visit.
    """
    if world_size == 1:
        return [Gathered(visit, 0, 0) for visit in visits]
    persistent = {p for visit in visits for p in visit.module.beneath if p.numel <= thresholds.persistence}
    order = [(p, step) for step, visit in enumerate(visits) for p in visit.module.own]
    queue = deque(order)
    latest: dict[Parameter, int] = {}
    state = _State(world_size)
    live = 0
    owner: Visit | None = None  # the module in whose backward pass a layer is being computed again
    recomputed: set[Parameter] = set()
    result = []
    for step, visit in enumerate(visits):
        wanted = [p for p in visit.module.own if p not in persistent]
        state.peak = state.now()
        before = state.arrived
        live += _gather(state, [p for p in wanted if p not in state.held and p not in state.flights])
        for p in wanted:
            _land(state, p)
        if recorded:
            expected = {p for p in visit.module.own if latest.get(p, -1) < step}
            seen: set[Parameter] = set()
            while queue and len(seen) < len(expected):
                p, used = queue.popleft()
                latest[p] = used
                seen.add(p)
            room = min(thresholds.max_live - live, thresholds.prefetch)
            ahead: list[Parameter] = []
            numel = 0
            while queue and numel < room:
                p, used = queue.popleft()
                latest[p] = max(latest.get(p, -1), used)
                if p in persistent or p in state.held or p in state.flights or p in ahead:
                    continue
                ahead.append(p)
                numel += p.numel
            live += _gather(state, ahead)
        result.append(Gathered(visit, state.peak, state.now(), state.arrived - before))
        recomputing = step + 1 < len(visits) and visits[step + 1].phase == "recompute"
        if recomputing and visit.phase == "backward":
            owner = visit
            continue
        going = set(_released(visits, step, thresholds.max_reuse, latest) if recorded else visit.module.own)
        if visit.phase == "recompute":
            # DeepSpeed lets go of frozen parameters where the owner's backward pass ends, and then of all of them.
            recomputed.update(p for p in visit.module.own if not p.trainable)
            going = {p for p in going if p.trainable and not (owner and p in owner.module.own)}
            if not recomputing:
                going |= recomputed
                if owner:
                    again = _released(visits, step, thresholds.max_reuse, latest, owner.module)
                    going |= set(again if recorded else owner.module.own)
                owner, recomputed = None, set()
        for p in going:
            if p in state.held and not p.external:
                del state.held[p]
                live -= p.numel
    return result


def _gather(state: _State, parameters: list[Parameter]) -> int:
    """Starts a collective; returns the elements it brings.

    One parameter arrives in its own place. Several arrive in one flat buffer, from which each is then copied: until
    the last of them is waited for, both are held (`AllGatherCoalescedHandle.wait`).
    """
    if not parameters:
        return 0
    padded = {p: p.per_rank(state.world_size) * state.world_size for p in parameters}
    if len(parameters) == 1:
        state.held[parameters[0]] = padded[parameters[0]]
    else:
        flight = _Flight(set(parameters), sum(padded.values()))
        state.flights.update(dict.fromkeys(parameters, flight))
        state.buffers += flight.buffer
    state.note()
    numel = sum(p.numel for p in parameters)
    state.arrived += numel
    return numel


def _land(state: _State, parameter: Parameter) -> None:
    flight = state.flights.pop(parameter, None)
    if flight is None:
        return
    if not flight.landed:
        flight.landed = True
        state.held.update({p: p.numel for p in flight.parameters})
        state.note()
    flight.parameters.discard(parameter)
    if not flight.parameters:
        state.buffers -= flight.buffer


def _released(
    visits: Sequence[Visit], step: int, max_reuse: int, latest: dict[Parameter, int], module: Module | None = None
) -> Iterable[Parameter]:
    """What the module lets go: not what prefetch has skipped as present, nor what is used again soon.

    Looking ahead, DeepSpeed counts modules' own parameters, but all beneath each module after a leaf.
    """
    module = module or visits[step].module
    going = {p for p in module.own if latest.get(p, -1) <= step + 1}
    passed = 0
    for visit in visits[step + 1 :]:
        if passed >= max_reuse or not going:
            break
        ahead = visit.module.beneath if module.leaf else (() if visit.module.leaf else visit.module.own)
        for p in ahead:
            going.discard(p)
            passed += p.numel
    return going
