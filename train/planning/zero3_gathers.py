"""What ZeRO-3 holds gathered, step by step: a replay of DeepSpeed's parameter coordinator on sizes instead of tensors.

A parameter is gathered when its module runs, or earlier where there is room (prefetch). It is released when its next
use is far away. The peak depends on the order of the modules and on four thresholds, so a sum is not enough. Source:
deepspeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py` (`fetch_sub_module`, `release_sub_module`) and
`partition_parameters.py` (`_all_gather_coalesced`). `benchmarks/plan.py` compares the replay with what real processes
hold.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One parameter.

    Attributes:
        name: Its name in the model.
        numel: Elements of the whole parameter.
        trainable: Whether it is part of the LoRA.
        external: Whether a module that does not own it uses it. Once gathered, it stays until the end of the step.
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
        own: The parameters it owns; for a leaf, all parameters beneath it.
        leaf: Whether it is a ZeRO-3 leaf module, which is gathered whole.
        beneath: All parameters beneath it, and its own.
    """

    name: str
    own: tuple[Parameter, ...] = ()
    leaf: bool = False
    beneath: tuple[Parameter, ...] = ()


class Visit(NamedTuple):
    """One run of a module within a micro step.

    Attributes:
        module: The module.
        phase: "forward", "recompute" or "backward".
    """

    module: Module
    phase: str


class Gathered(NamedTuple):
    """What is gathered around one visit, in elements; persistent parameters are not counted.

    Attributes:
        visit: The visit.
        fetching: The peak while the module's parameters arrive.
        running: What is held while the module runs.
        arriving: What is gathered in this visit, for the module or by prefetch.
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
        persistence: `stage3_param_persistence_threshold`. A parameter that is not larger stays gathered.
        max_live: `stage3_max_live_parameters`. Prefetch stops there.
        max_reuse: `stage3_max_reuse_distance`. A parameter that is used again within this distance is not released.
    """

    prefetch: int
    persistence: int
    max_live: int
    max_reuse: int


def replay(
    visits: Sequence[Visit], thresholds: Thresholds, world_size: int, *, recorded: bool = True
) -> list[Gathered]:
    """Replays one micro step.

    Args:
        visits: The modules in the order in which they run.
        thresholds: DeepSpeed's settings.
        world_size: Processes. A single process gathers nothing and uses the parameters in place.
        recorded: Whether DeepSpeed knows the order from the step before. It does not in DPO: forward passes of policy
            and reference alternate and each invalidates the other's record. Nothing is then prefetched or kept.

    Returns:
        One entry for each visit.
    """
    if world_size == 1:
        return [Gathered(visit, 0, 0) for visit in visits]
    coordinator = _Coordinator(visits, thresholds, world_size, recorded)
    return [coordinator.visit(step) for step in range(len(visits))]


@dataclass(eq=False)
class _Flight:
    """One collective: the parameters that are not yet waited for, and the flat buffer in which they arrive."""

    parameters: set[Parameter]
    buffer: int
    landed: bool = False


@dataclass
class _Coordinator:
    """DeepSpeed's parameter coordinator during one micro step; sizes in elements.

    Attributes:
        visits: All visits of the step.
        thresholds: DeepSpeed's settings.
        world_size: Processes.
        recorded: Whether the order of the visits is known.
        held: The gathered parameters, with their padded sizes.
        flights: The collective with which a parameter is arriving.
        buffers: The sum of the flat buffers.
        peak: The most that was held during the current visit.
        arrived: All that was gathered so far.
        live: DeepSpeed's count of gathered parameters, without padding and buffers.
        queue: The uses of parameters that are still to come in the record, each with its step.
        latest: The last step taken from the queue for each parameter.
        owner: The module whose backward pass runs the current recomputation.
        recomputed: The frozen parameters that the current recomputation has used.
    """

    visits: Sequence[Visit]
    thresholds: Thresholds
    world_size: int
    recorded: bool
    held: dict[Parameter, int] = field(default_factory=dict)
    flights: dict[Parameter, _Flight] = field(default_factory=dict)
    buffers: int = 0
    peak: int = 0
    arrived: int = 0
    live: int = 0
    latest: dict[Parameter, int] = field(default_factory=dict)
    owner: Module | None = None
    recomputed: set[Parameter] = field(default_factory=set)

    def __post_init__(self) -> None:
        threshold = self.thresholds.persistence
        self.persistent = {p for visit in self.visits for p in visit.module.beneath if p.numel <= threshold}
        self.queue = deque((p, step) for step, visit in enumerate(self.visits) for p in visit.module.own)

    def visit(self, step: int) -> Gathered:
        """Runs one module: gathers its parameters, prefetches, and releases what is not needed soon."""
        visit = self.visits[step]
        needed = [p for p in visit.module.own if p not in self.persistent]
        self.peak = self._held_now()
        arrived_before = self.arrived
        self._gather([p for p in needed if p not in self.held and p not in self.flights])
        for parameter in needed:
            self._land(parameter)
        if self.recorded:
            self._prefetch(step)
        result = Gathered(visit, self.peak, self._held_now(), self.arrived - arrived_before)
        self._release(step)
        return result

    def _held_now(self) -> int:
        return sum(self.held.values()) + self.buffers

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self._held_now())

    def _gather(self, parameters: list[Parameter]) -> None:
        """Starts a collective.

        A single parameter arrives in its own memory. Several arrive in one flat buffer, from which each is copied. Both
        exist until the last of them has been waited for (`AllGatherCoalescedHandle.wait`).
        """
        if not parameters:
            return
        padded = {p: p.per_rank(self.world_size) * self.world_size for p in parameters}
        if len(parameters) == 1:
            self.held[parameters[0]] = padded[parameters[0]]
        else:
            flight = _Flight(set(parameters), sum(padded.values()))
            self.flights.update(dict.fromkeys(parameters, flight))
            self.buffers += flight.buffer
        self._note_peak()
        numel = sum(p.numel for p in parameters)
        self.arrived += numel
        self.live += numel

    def _land(self, parameter: Parameter) -> None:
        """Waits for a parameter's collective, if it is still on its way."""
        flight = self.flights.pop(parameter, None)
        if flight is None:
            return
        if not flight.landed:
            flight.landed = True
            self.held.update({p: p.numel for p in flight.parameters})
            self._note_peak()
        flight.parameters.discard(parameter)
        if not flight.parameters:
            self.buffers -= flight.buffer

    def _prefetch(self, step: int) -> None:
        """Takes this visit's uses off the queue, then gathers the next parameters as far as there is room."""
        expected = {p for p in self.visits[step].module.own if self.latest.get(p, -1) < step}
        seen: set[Parameter] = set()
        while self.queue and len(seen) < len(expected):
            parameter, used = self.queue.popleft()
            self.latest[parameter] = used
            seen.add(parameter)
        room = min(self.thresholds.max_live - self.live, self.thresholds.prefetch)
        ahead: list[Parameter] = []
        numel = 0
        while self.queue and numel < room:
            parameter, used = self.queue.popleft()
            self.latest[parameter] = max(self.latest.get(parameter, -1), used)
            if parameter in self.persistent or parameter in self.held or parameter in self.flights:
                continue
            if parameter not in ahead:
                ahead.append(parameter)
                numel += parameter.numel
        self._gather(ahead)

    def _release(self, step: int) -> None:
        """Releases parameters after a visit.

        During a recomputation DeepSpeed releases frozen parameters only where the owner's backward pass ends, and then
        all of them.
        """
        module, phase = self.visits[step].module, self.visits[step].phase
        recompute_follows = step + 1 < len(self.visits) and self.visits[step + 1].phase == "recompute"
        if recompute_follows and phase == "backward":
            self.owner = module
            return
        released = self._not_needed_soon(module, step)
        if phase == "recompute":
            self.recomputed.update(p for p in module.own if not p.trainable)
            owned = self.owner.own if self.owner else ()
            released = {p for p in released if p.trainable and p not in owned}
            if not recompute_follows:
                released |= self.recomputed
                if self.owner:
                    released |= self._not_needed_soon(self.owner, step)
                self.owner, self.recomputed = None, set()
        for parameter in released:
            if parameter in self.held and not parameter.external:
                del self.held[parameter]
                self.live -= parameter.numel

    def _not_needed_soon(self, module: Module, step: int) -> set[Parameter]:
        """A module's parameters without those that prefetch skipped as present, or that are used again soon.

        To measure the distance to the next use, DeepSpeed counts the parameters that modules own; after a leaf, it
        counts all parameters beneath each module.
        """
        if not self.recorded:
            return set(module.own)
        released = {p for p in module.own if self.latest.get(p, -1) <= step + 1}
        passed = 0
        for visit in self.visits[step + 1 :]:
            if passed >= self.thresholds.max_reuse or not released:
                break
            ahead = visit.module.beneath if module.leaf else (() if visit.module.leaf else visit.module.own)
            for parameter in ahead:
                released.discard(parameter)
                passed += parameter.numel
        return released
