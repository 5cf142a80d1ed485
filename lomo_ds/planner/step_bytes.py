"""The bytes of a step: a rehearsal, what is gathered and which gradients are alive, added up moment by moment."""

from collections import Counter
from dataclasses import dataclass, field

from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, Slabs
from lomo_ds.planner.gathered import CoordinatorGathers, Gathered, NothingGathered
from lomo_ds.planner.gradients import Gradients, Partitioned, Reduced
from lomo_ds.planner.machine import Machine
from lomo_ds.planner.moments import Alive, Event, Moment, Rehearsal
from lomo_ds.planner.recorder import CHECKPOINT
from lomo_ds.planner.settings import Settings
from lomo_ds.update.rules.rule_bytes import sgd_state_bytes, sgd_temporaries, square_sums_bytes
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint
from lomo_ds.zero3 import Ahead
from lomo_ds.zero3.gathering import AHEAD_NUMEL, overlaps

SHARDS, GATHERED, IN_FLIGHT, STASH = "parameter shard", "gathered", "gradient in flight", "stash"
CHECKPOINTS, LOGITS, ACTIVATIONS, STATE = "checkpoints", "logits", "other activations", "rule state"
LEAVING, WORKSPACE, CONTEXT = "updated shards", "cuBLAS workspaces", "CUDA context"
KINDS = (SHARDS, GATHERED, IN_FLIGHT, STASH, CHECKPOINTS, LOGITS, ACTIVATIONS, STATE, LEAVING, WORKSPACE, CONTEXT)

FP32 = 4
ADAM_TEMPORARIES = 2  # fp32 copies of a partition, in an update that is not fused


@dataclass
class Memory:
    """Bytes of one rank.

    Attributes:
        at_peak: by kind, on the GPU at the moment when most is there.
        when: that moment, in words.
        sizes: the same bytes by kind and name, where they were asked for.
        host: by kind, pinned in host memory.
        nvme: by kind, on a disk.
        gathered_forward: elements of the parameters that a forward pass gathers; ``gathered_backward``, a backward.
    """

    at_peak: dict[str, int] = field(default_factory=dict)
    when: str = ""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)
    gathered_forward: int = 0
    gathered_backward: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the GPU when most is there."""
        return sum(self.at_peak.values())


def count_memory(
    rehearsal: Rehearsal, settings: Settings, machine: Machine, keeps: GradientFootprint, by_name: bool = False
) -> Memory:
    """What one rank takes in a step that is neither the first nor the second, in which DeepSpeed learns the order.

    Args:
        by_name: whether ``sizes`` are wanted, which takes a while.
    """
    return _Ledger(rehearsal, settings, machine, keeps, by_name).run()


class _Ledger:
    """Adds up, and remembers the peak."""

    def __init__(
        self, rehearsal: Rehearsal, settings: Settings, machine: Machine, keeps: GradientFootprint, by_name: bool
    ) -> None:
        self.rehearsal, self.settings, self.keeps, self.by_name = rehearsal, settings, keeps, by_name
        self.memory = Memory()
        self.peak = -1
        self.moment = Moment(Event.END, -1, 0, 0)
        self.checkpoints: dict[int, int] = {}  # alive, by layer
        self.away = 0  # of them, in host memory
        self.shard_numel = sum(settings.shard_numel(numel) for numel in rehearsal.numels)
        self.on_host = machine.device == "cpu"  # where no memory but the host's is
        self.base = self._base(machine)
        self.gathered: Gathered = self._gathered(machine)
        self.gradients: Gradients
        if settings.optimizer == "lomo":
            temporaries = sgd_temporaries(settings.dtype, machine.device)
            self.gradients = Reduced(
                rehearsal, settings, keeps, temporaries, self._see_gradients, self.on_host, self.gathered
            )
        else:
            self.gradients = Partitioned(rehearsal, settings, self._see_gradients)

    def run(self) -> Memory:
        """A step, whose last micro-batch finds the stash as the others have left it."""
        self._place_on_host()
        for _ in range(min(2, self.settings.accumulation)):
            before = self.gathered.moved
            for moment in self.rehearsal.moments:
                self._pass(moment)
                if moment.event is Event.LOSS:
                    self.memory.gathered_forward = self.gathered.moved - before
            self.memory.gathered_backward = self.gathered.moved - before - self.memory.gathered_forward
        self.gradients.finish()
        if self.settings.optimizer != "lomo":
            self._step_of_baseline()
        self._see(self.moment.level, self.moment.logits_level, self.gathered.refreshed, self.moment.alive_level)
        return self.memory

    def _gathered(self, machine: Machine) -> Gathered:
        settings = self.settings
        if settings.resident:
            return NothingGathered()
        runs_ahead = machine.device == "gpu" and settings.optimizer == "lomo" and overlaps(settings.offload_param)
        ahead = Ahead(settings.prefetch_bucket_size + AHEAD_NUMEL) if runs_ahead else None
        return CoordinatorGathers(self.rehearsal, settings, ahead)

    def _base(self, machine: Machine) -> Counter[str]:
        """What is there all the time."""
        settings, found = self.settings, Counter({CONTEXT: machine.context, ACTIVATIONS: self.rehearsal.buffers})
        if settings.offload_param == "none":
            found[SHARDS] = settings.stored_bytes(self.shard_numel)
        elif self.on_host:
            found[SHARDS] = self._pinned_shards()
        if not self.on_host:
            found[WORKSPACE] = machine.workspace
        if settings.optimizer == "lomo":
            found[STATE] = sgd_state_bytes(self.shard_numel)
            if self.keeps.square_sums and not self.on_host:
                found[STATE] += sum(map(square_sums_bytes, map(settings.shard_numel, self.rehearsal.numels)))
        else:
            states = 2 if settings.optimizer == "adamw" else 0
            found[STATE] = (1 + states) * FP32 * self.shard_numel
            bucket = min(settings.reduce_bucket_size, self.rehearsal.numel)
            found[IN_FLIGHT] = (self.shard_numel + bucket) * settings.dtype.itemsize
        return found

    def _place_on_host(self) -> None:
        settings, host = self.settings, self.memory.host
        stored = settings.stored_bytes(self.shard_numel)
        if settings.offload_param == "cpu" and not self.on_host:
            host[SHARDS] = self._pinned_shards()
        if settings.offload_param == "nvme":
            self.memory.nvme[SHARDS] = stored
            host[SHARDS] = self._buffers_of_nvme()
        if self.keeps.on_host:
            itemsize = settings.dtype.itemsize
            sizes = [settings.shard_numel(numel) * itemsize for numel in reversed(self.rehearsal.numels)]
            host[STASH] = pinned_bytes([self.keeps.bytes_of(size, itemsize) for size in sizes])
        if settings.activation_offload:
            host[CHECKPOINTS] = pinned_bytes(list(self.rehearsal.checkpoints.values()))

    def _buffers_of_nvme(self) -> int:
        """Between the drive and the GPU, as DeepSpeed's defaults have them; torch pins powers of two."""
        defaults, itemsize = DeepSpeedZeroOffloadParamConfig(), self.settings.dtype.itemsize
        largest = max(self.settings.shard_numel(numel) for numel in self.rehearsal.numels)
        size = min(defaults.buffer_size, largest) * itemsize
        return defaults.buffer_count * (1 << (size - 1).bit_length())

    def _pinned_shards(self) -> int:
        sizes = [self.settings.stored_bytes(self.settings.shard_numel(numel)) for numel in self.rehearsal.numels]
        return pinned_bytes(sizes)

    def _pass(self, moment: Moment) -> None:
        self.moment = moment
        self._see(moment.peak, moment.logits, self.gathered.level, moment.alive)
        if moment.event is Event.GRADIENT:
            self.gradients.add(moment.index)
            return
        if moment.event is Event.END:
            self.gradients.flush()
        if moment.index in self.rehearsal.layers:
            self._follow_checkpoint(moment)
        self.gathered.peak = self.gathered.level
        self.gathered.see(moment.event, moment.index)
        self._see(moment.level, moment.logits_level, self.gathered.peak, moment.alive_level)

    def _follow_checkpoint(self, moment: Moment) -> None:
        """A layer's input is kept from its forward to the end of its backward.

        Where they are offloaded, the last ones are on their way in forward, and in backward one beside that in use.
        """
        if not self.settings.gradient_checkpointing:
            return
        if moment.event is Event.FETCH_FORWARD:
            self.checkpoints.setdefault(moment.index, self.rehearsal.checkpoints[moment.index])
        elif moment.event is Event.FREE_BACKWARD:
            self.checkpoints.pop(moment.index, None)
        if self.settings.activation_offload:
            in_forward = moment.event in (Event.FETCH_FORWARD, Event.FREE_FORWARD)
            self.away = _beyond(list(self.checkpoints.values()), IN_FLIGHT_BYTES if in_forward else 0)

    def _see_gradients(self) -> None:
        self._see(self.moment.level, self.moment.logits_level, self.gathered.level, self.moment.alive_level)

    def _see(self, activations: int, logits: int, gathered: int, alive: Alive) -> None:
        gradients = self.gradients
        total = activations - self.away + gathered + gradients.level + gradients.stashed + gradients.parts
        if total < self.peak:
            return
        self.peak = total
        checkpoints = sum(self.checkpoints.values())
        found = self.base + Counter({GATHERED: gathered, LOGITS: logits, CHECKPOINTS: checkpoints - self.away})
        found[IN_FLIGHT] += gradients.level
        found[STASH] += gradients.stashed
        found[LEAVING] += gradients.parts
        found[ACTIVATIONS] += activations - logits - checkpoints
        self.memory.at_peak = {kind: found[kind] for kind in KINDS}
        self.memory.when = self._when()
        if self.by_name:
            self.memory.sizes = self._name_sizes(alive)

    def _name_sizes(self, alive: Alive) -> dict[tuple[str, str], int]:
        """``at_peak`` in its parts; what has no name of its own stands under its kind alone."""
        activations = self.rehearsal.sizes_of(alive)
        activations[CHECKPOINT] -= self.away
        sizes = {(ACTIVATIONS, name): size for name, size in activations.items()}
        sizes |= {(GATHERED, name): size for name, size in self.gathered.sizes().items()}
        rest = dict(self.memory.at_peak)
        for kind in (CHECKPOINTS, LOGITS):
            rest[ACTIVATIONS] += rest.pop(kind)
        for (kind, _), size in sizes.items():
            rest[kind] -= size
        return sizes | {(kind, "in passing" if kind == GATHERED else ""): size for kind, size in rest.items()}

    def _when(self) -> str:
        event, index = self.moment.event, self.moment.index
        if event is Event.GRADIENT:
            return f"when the gradient of {self.rehearsal.names[index]} arrives"
        if event is Event.LOSS:
            return "in the loss"
        if event is Event.END:
            return "when backward has ended"
        names = [self.rehearsal.names[p] for p in self.rehearsal.modules[index][:1]]
        way = "forward" if event in (Event.FETCH_FORWARD, Event.FREE_FORWARD) else "backward"
        side = "before" if event in (Event.FETCH_FORWARD, Event.FETCH_BACKWARD) else "at"
        return f"in {way}, {side} {names[0]}" if names else f"in {way}"

    def _step_of_baseline(self) -> None:
        """The optimizer's step: fp32 gradients of all partitions, and what its update takes in passing."""
        settings = self.settings
        copies = 1
        if settings.optimizer == "adamw" and not settings.fused:
            copies += ADAM_TEMPORARIES
        total = copies * FP32 * self.shard_numel + self.gathered.level
        if total < self.peak:
            return
        self.peak = total
        found = self.base + Counter({GATHERED: self.gathered.level})
        found[IN_FLIGHT] += FP32 * self.shard_numel
        found[ACTIVATIONS] += (copies - 1) * FP32 * self.shard_numel
        self.memory.at_peak = {kind: found[kind] for kind in KINDS}
        self.memory.when = "in the optimizer's step"
        self.memory.sizes = {(kind, ""): size for kind, size in self.memory.at_peak.items()}


def _beyond(sizes: list[int], limit: int) -> int:
    """All of ``sizes`` but the last two, and those before them that fit into ``limit`` with them."""
    near = 0
    for number, size in enumerate(reversed(sizes)):
        if number >= 2 and near + size > limit:
            break
        near += size
    return sum(sizes) - near


def pinned_bytes(sizes: list[int]) -> int:
    """The bytes that ``PinnedMemory`` pins for tensors of ``sizes`` bytes, in their order: whole slabs."""
    slabs = Slabs(sum(sizes))
    for size in sizes:
        slabs.place(size)
    return sum(slabs.sizes)
