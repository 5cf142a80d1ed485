"""Estimates the time of a step, how it divides among arithmetic and links, and which of these is the bottleneck.

Within a phase (forward, backward, the updates after it), arithmetic and each direction of each link overlap, so a
phase takes as long as the slowest of them. Phases follow one another.
"""

from collections import Counter
from dataclasses import dataclass

from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_memory import StepMemory
from lomo_ds.planner.trace_events import StepTrace
from lomo_ds.simulate.machine import Machine
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint

COMPUTE, HOST_TO_GPU, GPU_TO_HOST, PEERS, NVME = "compute", "link up", "link down", "between GPUs", "nvme"
BOTTLENECK_NAMES = {
    COMPUTE: "arithmetic",
    HOST_TO_GPU: "the link",
    GPU_TO_HOST: "the link",
    PEERS: "the link between GPUs",
    NVME: "the disk",
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        by_kind: seconds that each kind takes by itself.
        total: seconds of the whole step.
        bottleneck: the kind that the step waits for longest.
        link_bytes: bytes that one GPU moves in a step, by kind.
    """

    by_kind: dict[str, float]
    total: float
    bottleneck: str
    link_bytes: dict[str, int]

    @property
    def waits_for_links(self) -> bool:
        """Return whether more than a tenth of the step passes without arithmetic."""
        return self.by_kind[COMPUTE] < 0.9 * self.total

    @property
    def slowest_link_name(self) -> str:
        """The link or disk that is busy longest, in words."""
        links = [kind for kind in self.by_kind if kind != COMPUTE]
        return BOTTLENECK_NAMES[max(links, key=lambda kind: self.by_kind[kind])]

    @property
    def bottleneck_name(self) -> str:
        """The bottleneck in words."""
        return BOTTLENECK_NAMES[self.bottleneck]


def estimate_time(
    trace: StepTrace, settings: Settings, machine: Machine, footprint: GradientFootprint, memory: StepMemory
) -> StepTime:
    """Return the shortest time that a step of ``settings`` can take on ``machine``."""
    forward, backward, after = _phases(trace, settings, footprint, memory)
    times = settings.accumulation_steps // settings.joined * footprint.passes
    phases = [(_seconds(forward, machine), times), (_seconds(backward, machine), times), (_seconds(after, machine), 1)]
    if not settings.is_baseline and not footprint.on_device and not footprint.on_host:
        # updates happen in the last backward and overlap with it
        written = Counter({HOST_TO_GPU: after[HOST_TO_GPU], GPU_TO_HOST: after[GPU_TO_HOST], NVME: after[NVME]})
        phases = [phases[0], (phases[1][0], times - 1), (_seconds(backward + written, machine), 1)]
        after = written
    by_kind = dict.fromkeys(BOTTLENECK_NAMES, 0.0)
    waited: dict[str, float] = dict.fromkeys(BOTTLENECK_NAMES, 0.0)
    step = 0.0
    for seconds, count in phases:
        slowest = max(seconds, key=lambda kind: seconds[kind])
        step += count * seconds[slowest]
        waited[slowest] += count * seconds[slowest]
        by_kind = {kind: value + count * seconds[kind] for kind, value in by_kind.items()}
    links = (HOST_TO_GPU, GPU_TO_HOST, PEERS, NVME)
    total = Counter({kind: times * (forward[kind] + backward[kind]) + after[kind] for kind in links})
    return StepTime(by_kind, step, max(waited, key=lambda kind: waited[kind]), dict(total))


def _phases(
    trace: StepTrace, settings: Settings, footprint: GradientFootprint, memory: StepMemory
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return operations and bytes of one forward pass, of one backward pass, and of what happens once per step."""
    numel, gpus, itemsize = trace.numel, settings.gpus, settings.dtype.itemsize
    remote_share = (gpus - 1) / gpus
    forward, backward, after = Counter[str](), Counter[str](), Counter[str]()
    forward[COMPUTE] = trace.forward_flops
    backward[COMPUTE] = trace.flops - trace.forward_flops
    shards = settings.stored_bytes(settings.shard_numel(numel))
    for phase, gathered in ((forward, memory.gathered_forward), (backward, memory.gathered_backward)):
        own_shards = settings.stored_bytes(settings.shard_numel(gathered))
        phase[PEERS] = int(settings.sent_bytes(settings.shard_numel(gathered)) * gpus * remote_share)
        if settings.offload_param != "none":
            phase[HOST_TO_GPU] = own_shards
        if settings.offload_param == "nvme":
            phase[NVME] = own_shards * settings.gpus_per_host
    backward[PEERS] += int(numel * settings.gradient_dtype.itemsize * remote_share)
    if settings.offload_param != "none":
        after[GPU_TO_HOST] += shards
        rounds_gathers = settings.int8_weights or settings.quantized_gathers
        on_gpu = not (footprint.on_device or footprint.on_host or rounds_gathers)
        if not on_gpu:  # at the update, the gathered copy has been freed, or was dequantized from int8
            after[HOST_TO_GPU] += shards
        if settings.offload_param == "nvme":
            after[NVME] += shards * settings.gpus_per_host * (1 if on_gpu else 2)
    if footprint.on_host:
        stash = footprint.bytes_of(settings.shard_numel(numel) * itemsize, itemsize)
        backward[GPU_TO_HOST] += stash
        backward[HOST_TO_GPU] += stash * (settings.accumulation_steps > settings.joined)
        after[HOST_TO_GPU] += stash
    if settings.activation_offload:
        checkpoints = sum(trace.checkpoints.values())
        forward[GPU_TO_HOST] += checkpoints
        backward[HOST_TO_GPU] += checkpoints
    return forward, backward, after


def _seconds(phase: Counter[str], machine: Machine) -> dict[str, float]:
    """Return the seconds of one phase by kind; GPUs without a link of their own share the link to the host."""
    peers = phase[PEERS] / machine.gpu_link if machine.gpu_link else 0.0
    shared = 0 if machine.gpu_link else phase[PEERS]
    return {
        COMPUTE: phase[COMPUTE] / (machine.flops * machine.utilisation),
        HOST_TO_GPU: (phase[HOST_TO_GPU] + shared) / machine.pcie,
        GPU_TO_HOST: (phase[GPU_TO_HOST] + shared) / machine.pcie,
        PEERS: peers,
        NVME: phase[NVME] / machine.nvme if phase[NVME] else 0.0,
    }
