"""Finds the peak memory of a step: adds up activations, gathered parameters and gradients at each traced event."""

from collections import Counter
from dataclasses import dataclass, field

from lomo_ds import zero3
from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, Slabs
from lomo_ds.planner.gathered_params import GatheredParams, NoGathering, SimulatedCoordinator
from lomo_ds.planner.live_gradients import DeepSpeedGradients, LiveGradients, LomoGradients
from lomo_ds.planner.rule_memory import RuleMemory
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_events import EventKind, LiveActivations, StepTrace, TraceEvent
from lomo_ds.planner.trace_recorder import CHECKPOINT, SUMS
from lomo_ds.simulate.machine import Machine
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint
from lomo_ds.zero3 import LookaheadLimit
from lomo_ds.zero3.gathering import AHEAD_NUMEL, default_overlap_comm

SHARDS, GATHERED, IN_FLIGHT, STASH = "parameter shard", "gathered", "gradient in flight", "stash"
CHECKPOINTS, LOGITS, ACTIVATIONS, STATE = "checkpoints", "logits", "other activations", "rule state"
UPDATED_SHARDS, WORKSPACE, CONTEXT = "updated shards", "cuBLAS workspaces", "CUDA context"
KINDS = (
    SHARDS,
    GATHERED,
    IN_FLIGHT,
    STASH,
    CHECKPOINTS,
    LOGITS,
    ACTIVATIONS,
    STATE,
    UPDATED_SHARDS,
    WORKSPACE,
    CONTEXT,
)

FP32 = 4
ADAM_TEMPORARIES = 2  # fp32 copies of a partition that an update without fusion allocates


@dataclass
class StepMemory:
    """Bytes of one rank.

    Attributes:
        at_peak: GPU bytes by kind at the peak.
        when: the point of the step at which the peak occurs, in words.
        sizes: the bytes of ``at_peak`` by kind and tensor name; empty unless requested.
        host: pinned host bytes by kind.
        nvme: bytes on NVMe by kind.
        gathers: requests at each event, by its position in the trace; see ``GatheredParams``.
    """

    at_peak: dict[str, int] = field(default_factory=dict)
    when: str = ""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)
    gathers: dict[int, list[list[list[int]]]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """GPU bytes at the peak."""
        return sum(self.at_peak.values())


def estimate_memory(
    trace: StepTrace, settings: Settings, machine: Machine, footprint: GradientFootprint, by_name: bool = False
) -> StepMemory:
    """Return the memory of one rank in a step after the first two, in which DeepSpeed learns the order of modules.

    Args:
        by_name: fill in ``sizes``, which takes longer.
    """
    return _PeakTracker(trace, settings, machine, footprint, by_name).run()


class _PeakTracker:
    """Adds up all memory at each event, and keeps the peak."""

    def __init__(
        self, trace: StepTrace, settings: Settings, machine: Machine, footprint: GradientFootprint, by_name: bool
    ) -> None:
        self.trace, self.settings, self.footprint, self.by_name = trace, settings, footprint, by_name
        self.memory = StepMemory()
        self.peak = -1
        self.event = TraceEvent(EventKind.END, -1, 0, 0)
        self.checkpoints: dict[int, int] = {}  # bytes of live activation checkpoints, by layer
        self.offloaded = 0  # bytes of them in host memory
        self.shard_numel = sum(settings.shard_numel(numel) for numel in trace.numels)
        self.on_host = machine.device == "cpu"  # ranks compute on the CPU, in host memory
        self.rule = None if settings.is_baseline else RuleMemory(trace, settings, machine.device)
        self.base = self._base(machine)
        self.gathered: GatheredParams = self._build_gathered(machine)
        self.gradients: LiveGradients
        if self.rule is not None:
            self.gradients = LomoGradients(
                trace, settings, footprint, self.rule, self._observe_gradients, self.on_host, self.gathered
            )
        else:
            self.gradients = DeepSpeedGradients(trace, settings, self._observe_gradients)

    def run(self) -> StepMemory:
        """Simulate a step. Of several passes two are enough: the second finds the stash of the first."""
        self._count_host()
        for _ in range(min(2, self.settings.accumulation_steps // self.settings.joined)):
            for position, event in enumerate(self.trace.events):
                self.gathered.gathers = []
                self._handle(event)
                self.memory.gathers[position] = self.gathered.gathers
        self.gradients.finish()
        if self.settings.is_baseline:
            self._optimizer_step()
        self._observe(self.event.level, self.event.logits_level, self.gathered.refreshed, self.event.live)
        return self.memory

    def _build_gathered(self, machine: Machine) -> GatheredParams:
        settings = self.settings
        if settings.resident:
            return NoGathering()
        runs_ahead = (
            machine.device == "gpu" and not settings.is_baseline and default_overlap_comm(settings.offload_param)
        )
        ahead = LookaheadLimit(settings.prefetch_bucket_size + AHEAD_NUMEL) if runs_ahead else None
        return SimulatedCoordinator(self.trace, settings, ahead)

    def _base(self, machine: Machine) -> Counter[str]:
        """Return the bytes by kind that are allocated during the whole step."""
        settings, base = self.settings, Counter({CONTEXT: machine.context, ACTIVATIONS: self.trace.buffers})
        if settings.offload_param == "none":
            base[SHARDS] = settings.stored_bytes(self.shard_numel)
        elif self.on_host:
            base[SHARDS] = self._pinned_shard_bytes()
        if not self.on_host:
            base[WORKSPACE] = machine.workspace
        if self.rule is not None:
            base[STATE] = self.rule.state()
            if self.footprint.square_sums:
                base[STATE] += self.rule.square_sums()
        else:
            states = 2 if settings.optimizer == "adamw" else 0
            base[STATE] = (1 + states) * FP32 * self.shard_numel
            bucket = min(settings.reduce_bucket_size, self.trace.numel)
            base[IN_FLIGHT] = (self.shard_numel + bucket) * settings.dtype.itemsize
        return base

    def _count_host(self) -> None:
        """Fill in the bytes in pinned host memory and on NVMe."""
        settings, host = self.settings, self.memory.host
        stored = settings.stored_bytes(self.shard_numel)
        if settings.offload_param == "cpu" and not self.on_host:
            host[SHARDS] = self._pinned_shard_bytes()
        if settings.offload_param == "nvme":
            self.memory.nvme[SHARDS] = stored
            host[SHARDS] = self._nvme_buffer_bytes()
        if self.footprint.on_host:
            itemsize = settings.dtype.itemsize
            sizes = [settings.shard_numel(numel) * itemsize for numel in reversed(self.trace.numels)]
            host[STASH] = pinned_bytes([self.footprint.bytes_of(size, itemsize) for size in sizes])
        if settings.activation_offload:
            host[CHECKPOINTS] = self._pinned_checkpoint_bytes()

    def _nvme_buffer_bytes(self) -> int:
        """Return the bytes of the default buffers between NVMe and GPU; torch pins powers of two."""
        count, piece_bytes = zero3.default_pieces(self.settings.dtype.itemsize)
        largest = max(self.settings.shard_numel(numel) for numel in self.trace.numels)
        size = min(piece_bytes, largest * self.settings.dtype.itemsize)
        return count * (1 << (size - 1).bit_length())

    def _pinned_checkpoint_bytes(self) -> int:
        """Return the bytes that ``ActivationOffload`` pins: a buffer for each micro-batch that a module has seen."""
        sizes = [size // self.settings.joined for size in self.trace.checkpoints.values()]
        return pinned_bytes(sizes * self.settings.joined)

    def _pinned_shard_bytes(self) -> int:
        sizes = [self.settings.stored_bytes(self.settings.shard_numel(numel)) for numel in self.trace.numels]
        return pinned_bytes(sizes)

    def _handle(self, event: TraceEvent) -> None:
        self.event = event
        self._observe(event.peak, event.logits, self.gathered.level, event.live_at_peak)
        if event.kind is EventKind.GRADIENT:
            self.gradients.add(event.index)
            return
        if event.kind is EventKind.END:
            self.gradients.flush()
        if event.index in self.trace.checkpoints and (self.settings.gradient_checkpointing or self.settings.joined > 1):
            self._update_checkpoints(event)
        self.gathered.peak = self.gathered.level
        self.gathered.handle(event.kind, event.index)
        self._observe(event.level, event.logits_level, self.gathered.peak, event.live)

    def _update_checkpoints(self, event: TraceEvent) -> None:
        """Add a layer's input when its forward begins, and remove it when its backward ends.

        With activation offload, the GPU still holds the newest inputs: in forward those that are being copied to host
        memory, in backward the one in use and the next one, each of one micro-batch.
        """
        if event.kind is EventKind.FETCH_FORWARD:
            self.checkpoints.setdefault(event.index, self.trace.checkpoints[event.index])
        elif event.kind is EventKind.FREE_BACKWARD:
            self.checkpoints.pop(event.index, None)
        if self.settings.activation_offload:
            in_forward = event.kind in (EventKind.FETCH_FORWARD, EventKind.FREE_FORWARD)
            sizes = list(self.checkpoints.values())
            if in_forward:
                self.offloaded = _bytes_offloaded(sizes, IN_FLIGHT_BYTES)
            else:
                micro_batches = [size // self.settings.joined for size in sizes for _ in range(self.settings.joined)]
                self.offloaded = _bytes_offloaded(micro_batches, 0)

    def _observe_gradients(self) -> None:
        self._observe(self.event.level, self.event.logits_level, self.gathered.level, self.event.live)

    def _observe(self, activations: int, logits: int, gathered: int, live: LiveActivations) -> None:
        """Keep the bytes by kind if they exceed the peak so far."""
        gradients = self.gradients
        total = activations - self.offloaded + gathered + gradients.level + gradients.stashed + gradients.shards
        if total < self.peak:
            return
        self.peak = total
        checkpoints, sums = sum(self.checkpoints.values()), live.sizes.get(SUMS, 0)
        sizes = self.base + Counter({GATHERED: gathered, LOGITS: logits, CHECKPOINTS: checkpoints - self.offloaded})
        sizes[IN_FLIGHT] += gradients.level + sums
        sizes[STASH] += gradients.stashed
        sizes[UPDATED_SHARDS] += gradients.shards
        sizes[ACTIVATIONS] += activations - logits - checkpoints - sums
        self.memory.at_peak = {kind: sizes[kind] for kind in KINDS}
        self.memory.when = self._when()
        if self.by_name:
            self.memory.sizes = self._sizes_by_name(live)

    def _sizes_by_name(self, live: LiveActivations) -> dict[tuple[str, str], int]:
        """Return ``at_peak`` split by tensor name; bytes without a tensor name are listed under an empty name."""
        activations = self.trace.sizes_of(live)
        activations[CHECKPOINT] -= self.offloaded
        sizes = {(IN_FLIGHT if name == SUMS else ACTIVATIONS, name): size for name, size in activations.items()}
        sizes |= {(GATHERED, name): size for name, size in self.gathered.sizes().items()}
        rest = dict(self.memory.at_peak)
        for kind in (CHECKPOINTS, LOGITS):
            rest[ACTIVATIONS] += rest.pop(kind)
        for (kind, _), size in sizes.items():
            rest[kind] -= size
        return sizes | {(kind, "temporary" if kind == GATHERED else ""): size for kind, size in rest.items()}

    def _when(self) -> str:
        """Describe the current event in words."""
        kind, index = self.event.kind, self.event.index
        if kind is EventKind.GRADIENT:
            return f"when the gradient of {self.trace.names[index]} arrives"
        if kind is EventKind.LOSS:
            return "in the loss"
        if kind is EventKind.END:
            return "when backward has ended"
        names = [self.trace.names[p] for p in self.trace.modules[index][:1]]
        direction = "forward" if kind in (EventKind.FETCH_FORWARD, EventKind.FREE_FORWARD) else "backward"
        side = "before" if kind in (EventKind.FETCH_FORWARD, EventKind.FETCH_BACKWARD) else "at"
        return f"in {direction}, {side} {names[0]}" if names else f"in {direction}"

    def _optimizer_step(self) -> None:
        """Observe the optimizer's step of DeepSpeed: fp32 gradients of all partitions, and its temporaries."""
        settings = self.settings
        copies = 1
        if settings.optimizer == "adamw" and not settings.fused:
            copies += ADAM_TEMPORARIES
        total = copies * FP32 * self.shard_numel + self.gathered.level
        if total < self.peak:
            return
        self.peak = total
        sizes = self.base + Counter({GATHERED: self.gathered.level})
        sizes[IN_FLIGHT] += FP32 * self.shard_numel
        sizes[ACTIVATIONS] += (copies - 1) * FP32 * self.shard_numel
        self.memory.at_peak = {kind: sizes[kind] for kind in KINDS}
        self.memory.when = "in the optimizer's step"
        self.memory.sizes = {(kind, ""): size for kind, size in self.memory.at_peak.items()}


def _bytes_offloaded(sizes: list[int], limit: int) -> int:
    """Return the sum of ``sizes`` without the last two and those before them that fit into ``limit`` with them."""
    on_gpu = 0
    for number, size in enumerate(reversed(sizes)):
        if number >= 2 and on_gpu + size > limit:
            break
        on_gpu += size
    return sum(sizes) - on_gpu


def pinned_bytes(sizes: list[int]) -> int:
    """Return the bytes of the slabs that ``PinnedMemory`` pins for tensors of ``sizes`` bytes, in their order."""
    slabs = Slabs(sum(sizes))
    for size in sizes:
        slabs.place(size)
    return sum(slabs.sizes)
