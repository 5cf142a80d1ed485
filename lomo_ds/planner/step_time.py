"""Estimates the time of a step, how it divides among the parts of a machine, and which of these is the bottleneck.

The trace's events are followed with a clock for each lane of the machine. Kernels run one after the other and wait for
the parameters of their module; a gather starts when the engine asks for it and its link is free; buckets of gradients
are reduced, and shards updated and copied, beside the kernels of backward.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.memory.prefetch import LOOK_AHEAD
from lomo_ds.planner.engine_work import EngineWork, ShardWork
from lomo_ds.planner.lane_clocks import LaneClocks
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_memory import StepMemory
from lomo_ds.planner.trace_events import EventKind, StepTrace
from lomo_ds.simulate.machine import Machine
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.timeline import Lane
from lomo_ds.update.buckets import Buckets
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint
from lomo_ds.zero3 import LookaheadLimit
from lomo_ds.zero3.gathering import AHEAD_NUMEL, default_overlap_comm, layer_of
from lomo_ds.zero3.stores.host_store import max_offload_bytes

COMPUTE, LAUNCHES = "compute", "launches"
HOST_TO_GPU, GPU_TO_HOST, PEERS, NVME = "link up", "link down", "between GPUs", "nvme"
LANES = {
    COMPUTE: Lane.COMPUTE,
    HOST_TO_GPU: Lane.LINK_UP,
    GPU_TO_HOST: Lane.LINK_DOWN,
    PEERS: Lane.WIRE,
    NVME: Lane.DISK,
    LAUNCHES: Lane.HOST,
}
MOVED = {HOST_TO_GPU: "up", GPU_TO_HOST: "down", PEERS: "sent", NVME: "disk"}  # the links, and the fields of Work
BOTTLENECK_NAMES = {
    COMPUTE: "arithmetic",
    HOST_TO_GPU: "the link",
    GPU_TO_HOST: "the link",
    PEERS: "the link between GPUs",
    NVME: "the disk",
    LAUNCHES: "the host, which launches kernels",
}
# Small kernels and copies with which the engine counts tokens, and agrees on losses and norms
KERNELS_OF_A_STEP, KERNELS_OF_A_MICRO_BATCH = Counter({Work(): 28}), Counter({Work(): 6})


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        by_kind: seconds that each kind takes by itself.
        total: seconds of the whole step.
        link_bytes: bytes that one GPU moves in a step, by kind.
    """

    by_kind: dict[str, float]
    total: float
    link_bytes: dict[str, int]

    @property
    def bottleneck(self) -> str:
        """The kind that is busy longest."""
        return max(self.by_kind, key=lambda kind: self.by_kind[kind])

    @property
    def waits_for_links(self) -> bool:
        """Return whether more than a tenth of the step passes without a kernel, because of a link."""
        return max(self.by_kind[COMPUTE], self.by_kind[LAUNCHES]) < 0.9 * self.total

    @property
    def slowest_link_name(self) -> str:
        """The link or disk that is busy longest, in words."""
        return BOTTLENECK_NAMES[max(MOVED, key=lambda kind: self.by_kind[kind])]

    @property
    def bottleneck_name(self) -> str:
        """The bottleneck in words."""
        return BOTTLENECK_NAMES[self.bottleneck]


def estimate_time(
    trace: StepTrace, settings: Settings, machine: Machine, footprint: GradientFootprint, memory: StepMemory
) -> StepTime:
    """Return the time that a step of ``settings`` takes on ``machine``."""
    clocks = LaneClocks(machine)
    step = _Step(trace, settings, footprint, memory, clocks)
    passes = footprint.passes * settings.accumulation_steps // settings.joined
    step.run_pass(is_first=True, measures=footprint.passes > 1)
    if passes > 1:
        before = clocks.copy()
        step.run_pass(is_first=False, measures=False)
        clocks.repeat(before, passes - 2)
    step.finish()
    busy = {kind: clocks.busy[lane] for kind, lane in LANES.items()}
    if not machine.gpu_link:  # peers communicate over the link to the host
        busy[PEERS] = 0.0
    return StepTime(busy, clocks.now, {kind: clocks.moved[name] for kind, name in MOVED.items()})


class _Step:
    """The operations of a step, in the order in which the engine asks for them."""

    def __init__(
        self,
        trace: StepTrace,
        settings: Settings,
        footprint: GradientFootprint,
        memory: StepMemory,
        clocks: LaneClocks,
    ) -> None:
        self.trace, self.settings, self.memory, self.clocks = trace, settings, memory, clocks
        self.engine = EngineWork(settings, footprint)
        # of parameters that were not waited for yet: kernels that follow, and when the request has arrived
        self.arrivals: dict[int, tuple[list[Work], float]] = {}
        sizes = [settings.stored_bytes(settings.shard_numel(numel)) for numel in trace.numels]
        of_updates = max_offload_bytes(dict(zip(trace.names, sizes, strict=True)))
        self.max_offload_bytes = IN_FLIGHT_BYTES if self.engine.keeps_gradients else of_updates
        self.layer_numel: Counter[str | None] = Counter()  # what may be in flight, see ``BackwardHooks.summed``
        self.gathers_alone = not settings.is_baseline and default_overlap_comm(settings.offload_param)
        self.buckets: Buckets[int] = Buckets(max(trace.numels), settings.gpus, self._launch, self._land)
        self.in_flight: deque[tuple[list[int], float]] = deque()  # buckets, and when their reduction ends
        self.offloads: deque[tuple[int, float]] = deque()  # bytes, and when they have been copied
        self.order = [event.index for event in trace.events if event.kind is EventKind.GRADIENT]
        self.fetched: dict[int, float] = {}  # when the copies to the device that an update needs have arrived
        self.is_first = self.measures = False

    def run_pass(self, is_first: bool, measures: bool) -> None:
        """Run forward and backward; for the arguments see ``EngineWork.receive``."""
        self.is_first, self.measures = is_first, measures
        self.ahead = LookaheadLimit(self.settings.prefetch_bucket_size + AHEAD_NUMEL)
        self.points: list[float] = []  # when the device has reached each request
        self.clocks.run_kernels(KERNELS_OF_A_MICRO_BATCH)
        for position, event in enumerate(self.trace.events):
            self.clocks.run_kernels(event.kernels)
            if event.kind is EventKind.GRADIENT:
                self._add_gradient(event.index)
                continue
            own = self.trace.modules[event.index] if event.kind in FETCHES else []
            for request in self.memory.gathers.get(position, []):
                if not set(chain(*request)).intersection(own):  # it prefetches
                    self._wait_for(own)
                self._gather(request)
            self._wait_for(own)
            self._move_checkpoint(event.kind, event.index)
        self.buckets.flush()
        self._limit_offloads(0)
        self.clocks.wait(self.clocks.now)
        if measures:
            self._synchronize()

    def finish(self) -> None:
        """End the step: deferred updates, and the persistent parameters are gathered again."""
        self._synchronize()
        if self.settings.is_baseline or self.engine.keeps_gradients:
            in_order = list(range(len(self.trace.numels)))
            if self.engine.footprint.on_device:
                self.clocks.run(self.engine.norms(self.trace.numels))
            for p in in_order:
                self._process(p, in_order, self.engine.deferred_update)
        self.clocks.run_kernels(KERNELS_OF_A_STEP)
        if not self.settings.resident:
            self._synchronize()
            persistent = [numel for numel in self.trace.numels if numel <= self.settings.persistence_threshold]
            work = self.engine.gather(persistent)
            self.clocks.wait(self.clocks.run_in_order(work.travel))
            self.clocks.run_kernels(Counter(work.arrival))

    def _synchronize(self) -> None:
        self.clocks.wait(self.clocks.now, Lane.HOST)

    def _gather(self, request: list[list[int]]) -> None:
        """Start the collectives of a request; without a stream of its own, when the kernels before it have ended."""
        begin = 0.0
        if self.gathers_alone:
            self.points.append(self.clocks.compute)
            number = self.ahead.request(sum(self.trace.numels[p] for p in chain(*request)))
            if number is not None:
                self.clocks.wait(self.points[number], Lane.HOST)
        else:
            begin = self.clocks.compute
        kernels: list[Work] = []
        arrival = 0.0
        for batch in request:
            work = self.engine.gather([self.trace.numels[p] for p in batch])
            arrival = self.clocks.run_in_order(work.travel, begin)
            kernels += work.arrival
        self.arrivals.update(dict.fromkeys(chain(*request), (kernels, arrival)))

    def _wait_for(self, parameters: list[int]) -> None:
        """Let kernels wait for the requests of some parameters."""
        for p in parameters:
            if p in self.arrivals:
                kernels, arrival = self.arrivals.pop(p)
                self.clocks.wait(arrival)
                while kernels:  # shared by the parameters of a request
                    self.clocks.run(kernels.pop(0))

    def _add_gradient(self, p: int) -> None:
        numel, layer = self.trace.numels[p], layer_of(self.trace.names[p])
        if layer is not None and self.settings.joined > 1:
            self.layer_numel[layer] += numel
        self.buckets.add(p, numel, self.layer_numel[layer])

    def _launch(self, bucket: list[int]) -> None:
        """Start the reduction of a bucket."""
        numels = [self.trace.numels[p] for p in bucket]
        end = self.clocks.run_in_order(self.engine.reduce(numels), self.clocks.compute)
        self.in_flight.append((bucket, end))
        if self.settings.gpus == 1:
            self._land(0)

    def _land(self, limit: int) -> None:
        """Wait for the oldest reductions until at most ``limit`` elements are in flight."""
        while self.in_flight and sum(self.trace.numels[p] for bucket, _ in self.in_flight for p in bucket) > limit:
            bucket, end = self.in_flight.popleft()
            self.clocks.wait(end)
            if not self.settings.is_baseline:
                if self.measures or self.engine.footprint.on_host or self.engine.footprint.group:
                    self.clocks.run(self.engine.norms([self.trace.numels[p] for p in bucket]))
                for p in bucket:
                    self._process(p, self.order, self._receive)

    def _receive(self, numel: int) -> ShardWork:
        return self.engine.receive(numel, self.is_first, self.measures)

    def _process(self, p: int, order: list[int], work_of: Callable[[int], ShardWork]) -> None:
        """Run the operations on the shards of a parameter, and fetch for those that follow, like ``Prefetcher``."""
        work = work_of(self.trace.numels[p])
        if work.fetches:
            position, nbytes = order.index(p), 0
            for number, upcoming in enumerate(order[position : position + 1 + LOOK_AHEAD]):
                fetches = work_of(self.trace.numels[upcoming]).fetches
                nbytes += sum(fetch.up for fetch in fetches) if number else 0
                if number > 1 and nbytes > IN_FLIGHT_BYTES:
                    break
                if upcoming not in self.fetched:
                    self.fetched[upcoming] = self.clocks.run_in_order(fetches, self.clocks.compute)
            self.clocks.wait(self.fetched.pop(p))
        for kernel in work.kernels:
            self.clocks.run(kernel)
        if work.offloads:
            end = self.clocks.run_in_order(work.offloads, self.clocks.compute)
            self.offloads.append((sum(offload.down for offload in work.offloads), end))
            self._limit_offloads(self.max_offload_bytes)

    def _limit_offloads(self, limit: int) -> None:
        """Let kernels wait for the oldest copies to host memory, like ``HostTransfer``."""
        while len(self.offloads) > (1 if limit else 0) and sum(size for size, _ in self.offloads) > limit:
            self.clocks.wait(self.offloads.popleft()[1])

    def _move_checkpoint(self, kind: EventKind, index: int) -> None:
        """Copy the input of a layer to host memory in forward, and back before its backward."""
        size = self.trace.checkpoints.get(index, 0) if self.settings.activation_offload else 0
        moved = [size // self.settings.joined] * self.settings.joined if size else []
        for part in moved:
            if kind is EventKind.FREE_FORWARD:
                self.clocks.run(Work(down=part), self.clocks.compute)
            elif kind is EventKind.FETCH_BACKWARD:
                self.clocks.run(Work(up=part))


FETCHES = (EventKind.FETCH_FORWARD, EventKind.FETCH_BACKWARD)
