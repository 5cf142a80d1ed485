"""Operations that the engine adds to those of the model: gathers, reductions of gradients, stashes and updates."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lomo_ds.numerics import int8
from lomo_ds.planner.settings import Settings
from lomo_ds.simulate.program import Work
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint
from lomo_ds.zero3 import aligned_layout

FP32 = 4
MASTER_COPIES = {"sgd": 3, "adamw": 7}  # fp32 values that DeepSpeed's optimizers read and write for each weight


@dataclass
class GatherWork:
    """Operations that gather several parameters.

    Attributes:
        travel: one after the other, up to the arrival of the parameters.
        arrival: kernels that follow when the parameters are waited for.
    """

    travel: list[Work] = field(default_factory=list)
    arrival: list[Work] = field(default_factory=list)


@dataclass
class ShardWork:
    """Operations on the shards of a parameter and of its gradient.

    Attributes:
        fetches: copies to the device that can start early; ``kernels`` follow, and then ``offloads`` from the device.
    """

    fetches: list[Work] = field(default_factory=list)
    kernels: list[Work] = field(default_factory=list)
    offloads: list[Work] = field(default_factory=list)


class EngineWork:
    """Operations of one rank, as functions of the elements of full parameters.

    Args:
        footprint: the gradient shards that the schedule keeps.
    """

    def __init__(self, settings: Settings, footprint: GradientFootprint) -> None:
        self.settings, self.footprint = settings, footprint
        self.is_offloaded = settings.offload_param != "none"
        self.keeps_gradients = footprint.on_device or footprint.on_host
        rounds_gathers = settings.int8_weights or settings.quantized_gathers
        # whether shards are updated in the copy that backward has gathered
        self.updates_gathered = self.is_offloaded and not (self.keeps_gradients or rounds_gathers)
        self.gradient_itemsize = footprint.itemsize or settings.gradient_dtype.itemsize

    def gather(self, numels: Sequence[int]) -> GatherWork:
        """Return the operations of one collective, or of all copies of one request on a single rank."""
        settings, work = self.settings, GatherWork()
        shards = [settings.shard_numel(numel) for numel in numels]
        if not settings.is_baseline:
            for shard in shards:
                work.travel += self._pack(shard)
        elif len(numels) > 1:
            work.travel.append(_copy(sum(shards) * settings.dtype.itemsize))
        if settings.gpus > 1:
            _, row = aligned_layout([settings.sent_bytes(shard) for shard in shards])
            work.travel.append(Work(sent=row * (settings.gpus - 1)))
        for shard in shards:
            work.arrival += self._unpack(shard, len(numels) == 1)
        return work

    def reduce(self, numels: Sequence[int]) -> list[Work]:
        """Return the operations of the reduction of one bucket, one after the other; the last one is the collective."""
        settings = self.settings
        own, reduced = settings.dtype.itemsize, settings.gradient_dtype.itemsize
        work = [Work(memory=numel * (own + reduced)) for numel in numels] if own != reduced else []
        if settings.gpus == 1:
            return work
        shards = [settings.shard_numel(numel) for numel in numels]
        for shard, numel in zip(shards, numels, strict=True):
            if shard * settings.gpus > numel:
                work.append(_copy(shard * settings.gpus * reduced))  # adds padding
        if len(numels) > 1:
            work.append(_copy(sum(shards) * settings.gpus * reduced))
        return [*work, Work(sent=sum(shards) * (settings.gpus - 1) * reduced)]

    def norms(self, numels: Sequence[int]) -> Work:
        """Return the kernel that computes the norms of several gradient shards."""
        return Work(memory=sum(map(self.settings.shard_numel, numels)) * self.gradient_itemsize)

    def receive(self, numel: int, is_first: bool, measures: bool) -> ShardWork:
        """Return what the schedule does when a gradient shard arrives.

        Args:
            is_first: whether it is the first gradient of a step; later ones are added to the stash.
            measures: whether the pass is the first of two.
        """
        size = self.settings.shard_numel(numel) * self.settings.gradient_dtype.itemsize
        if measures:
            return ShardWork()
        if not self.keeps_gradients:
            return self.update(numel)
        kept = self.footprint.bytes_of(size, self.settings.gradient_dtype.itemsize)
        work = ShardWork()
        if not is_first:
            work.kernels.append(Work(memory=size + 2 * kept))
        elif kept != size:
            work.kernels.append(Work(memory=size + kept))
        if self.footprint.on_host:
            work.fetches += [] if is_first else [Work(up=kept)]
            work.offloads.append(Work(down=kept))
        return work

    def update(self, numel: int) -> ShardWork:
        """Return the update of a shard, from a gradient shard on the device."""
        shard = self.settings.shard_numel(numel)
        stored = self.settings.stored_bytes(shard)
        work = ShardWork(kernels=[Work(memory=2 * stored + shard * self.gradient_itemsize)])
        if not self.is_offloaded:
            return work
        disk = self._disk(stored)
        if not self.updates_gathered:
            work.fetches = [*disk, Work(up=stored)]
        elif self.settings.gpus > 1:
            work.kernels.insert(0, _copy(stored))  # of this rank's part of the gathered parameter
        work.offloads = [Work(down=stored), *disk]
        return work

    def deferred_update(self, numel: int) -> ShardWork:
        """Return the update of a shard from a stashed gradient, or by DeepSpeed's own optimizer."""
        shard = self.settings.shard_numel(numel)
        if self.settings.is_baseline:
            copies = MASTER_COPIES[self.settings.optimizer]
            return ShardWork(kernels=[Work(memory=shard * (copies * FP32 + 2 * self.settings.dtype.itemsize))])
        work, size = self.update(numel), shard * self.gradient_itemsize
        if self.footprint.on_host:
            work.fetches.append(Work(up=size))
        return work

    def _disk(self, stored: int) -> list[Work]:
        """Return the transfer of a shard between the drive and host memory, which all ranks of a host share."""
        return [Work(disk=stored * self.settings.gpus_per_host)] if self.settings.offload_param == "nvme" else []

    def _pack(self, shard: int) -> list[Work]:
        """Return the copy of a shard to where the gather reads it."""
        settings = self.settings
        stored = settings.stored_bytes(shard)
        work = [*self._disk(stored), Work(up=stored)] if self.is_offloaded else []
        if settings.is_sent_in_int8(shard) and not settings.int8_weights:
            return [*work, Work(memory=stored + int8.quantized_bytes(shard))]
        return work or ([_copy(stored)] if settings.gpus > 1 else [])

    def _unpack(self, shard: int, is_alone: bool) -> list[Work]:
        """Return the copy of a gathered parameter out of the receive buffer."""
        settings = self.settings
        whole = settings.gpus * shard * settings.dtype.itemsize
        if settings.is_sent_in_int8(shard):
            return [Work(memory=settings.gpus * settings.sent_bytes(shard) + whole)]
        return [_copy(whole)] if settings.gpus > 1 and not is_alone else []


def _copy(nbytes: int) -> Work:
    """Return the work of a copy within GPU memory, which reads and writes each byte."""
    return Work(memory=2 * nbytes)
