"""The seconds of a step, by what they are spent on; and which of it the others wait for.

Within a phase (forward, backward, the updates behind it) arithmetic and each direction of each link go on beside one
another, so a phase takes as long as the longest of them. Phases follow one another.
"""

from collections import Counter
from dataclasses import dataclass

from lomo_ds.planner.machine import Machine
from lomo_ds.planner.moments import Rehearsal
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_bytes import Memory
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint

COMPUTE, UP, DOWN, PEERS, NVME = "compute", "link up", "link down", "between GPUs", "nvme"
WORDS = {COMPUTE: "arithmetic", UP: "the link", DOWN: "the link", PEERS: "the link between GPUs", NVME: "the disk"}


@dataclass(frozen=True)
class Seconds:
    """Of a step.

    Attributes:
        by_kind: what each kind takes by itself.
        step: all together.
        bound: the kind that most of the step waits for.
        link_bytes: of a GPU in a step, by kind.
    """

    by_kind: dict[str, float]
    step: float
    bound: str
    link_bytes: dict[str, int]

    @property
    def bound_in_words(self) -> str:
        """For a sentence."""
        return WORDS[self.bound]


def count_seconds(
    rehearsal: Rehearsal, settings: Settings, machine: Machine, keeps: GradientFootprint, memory: Memory
) -> Seconds:
    """What a step of ``settings`` takes at best on ``machine``."""
    forward, backward, after = _phases(rehearsal, settings, keeps, memory)
    times = settings.accumulation * keeps.passes
    phases = [(_seconds(forward, machine), times), (_seconds(backward, machine), times), (_seconds(after, machine), 1)]
    if settings.optimizer == "lomo" and not keeps.on_device and not keeps.on_host:
        # in the last backward, beside what else it does
        written = Counter({UP: after[UP], DOWN: after[DOWN], NVME: after[NVME]})
        phases = [phases[0], (phases[1][0], times - 1), (_seconds(backward + written, machine), 1)]
        after = written
    by_kind = dict.fromkeys(WORDS, 0.0)
    waited: dict[str, float] = dict.fromkeys(WORDS, 0.0)
    step = 0.0
    for seconds, count in phases:
        longest = max(seconds, key=lambda kind: seconds[kind])
        step += count * seconds[longest]
        waited[longest] += count * seconds[longest]
        by_kind = {kind: value + count * seconds[kind] for kind, value in by_kind.items()}
    total = Counter({kind: times * (forward[kind] + backward[kind]) + after[kind] for kind in (UP, DOWN, PEERS, NVME)})
    return Seconds(by_kind, step, max(waited, key=lambda kind: waited[kind]), dict(total))


def _phases(
    rehearsal: Rehearsal, settings: Settings, keeps: GradientFootprint, memory: Memory
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Operations and bytes of a forward, a backward, and what comes once in a step."""
    numel, gpus, itemsize = rehearsal.numel, settings.gpus, settings.dtype.itemsize
    others = (gpus - 1) / gpus
    forward, backward, after = Counter[str](), Counter[str](), Counter[str]()
    forward[COMPUTE] = rehearsal.forward_flops
    backward[COMPUTE] = rehearsal.flops - rehearsal.forward_flops
    shards = settings.stored_bytes(settings.shard_numel(numel))
    for phase, gathered in ((forward, memory.gathered_forward), (backward, memory.gathered_backward)):
        mine = settings.stored_bytes(settings.shard_numel(gathered))
        phase[PEERS] = int(mine * gpus * others)
        if settings.offload_param != "none":
            phase[UP] = mine
        if settings.offload_param == "nvme":
            phase[NVME] = mine * settings.gpus_of_a_host
    backward[PEERS] += int(numel * itemsize * others)
    if settings.offload_param != "none":
        after[DOWN] += shards
        at_hand = not (keeps.on_device or keeps.on_host or settings.int8_weights)
        if not at_hand:  # updates come when gathered copies are gone, or have been rounded
            after[UP] += shards
        if settings.offload_param == "nvme":
            after[NVME] += shards * settings.gpus_of_a_host * (1 if at_hand else 2)
    if keeps.on_host:
        stash = keeps.bytes_of(settings.shard_numel(numel) * itemsize, itemsize)
        backward[DOWN] += stash
        backward[UP] += stash * (settings.accumulation > 1)
        after[UP] += stash
    if settings.activation_offload:
        checkpoints = sum(rehearsal.checkpoints.values())
        forward[DOWN] += checkpoints
        backward[UP] += checkpoints
    return forward, backward, after


def _seconds(phase: Counter[str], machine: Machine) -> dict[str, float]:
    """Of one phase; where GPUs reach each other over the link to the host, its bytes add up."""
    peers = phase[PEERS] / machine.gpu_link if machine.gpu_link else 0.0
    shared = 0 if machine.gpu_link else phase[PEERS]
    return {
        COMPUTE: phase[COMPUTE] / (machine.flops * machine.utilisation),
        UP: (phase[UP] + shared) / machine.pcie,
        DOWN: (phase[DOWN] + shared) / machine.pcie,
        PEERS: peers,
        NVME: phase[NVME] / machine.nvme if phase[NVME] else 0.0,
    }
