"""Stash schedule: keeps this rank's gradient shards until the global norm is known, for exact clipping in one pass."""

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, HostTransfer, PinnedMemory
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules.schedule import Schedule
from lomo_ds.update.target import Target
from lomo_ds.update.updater import Updater


class Stash(Schedule):
    """One pass; this rank's shards of all gradients, 1 / world size of the total, are on the device after backward.

    Shards are stored as they arrive, so the stash grows while backward frees activations.

    Args:
        dtype: the dtype shards are stored in; None keeps the gradients' dtype until a second gradient is accumulated,
            which converts the shard to float32.
    """

    keeps_gradients = True

    def __init__(self, updater: Updater, clipping: Clipping, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.stashed: dict[Target, Tensor] = {}
        super().__init__(updater, clipping)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.stashed.clear()

    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        for target, gradient in zip(targets, gradients, strict=True):
            if target in self.stashed:
                self.stashed[target] = self.stashed[target].float().add_(gradient)
            else:
                self.stashed[target] = gradient if self.dtype is None else gradient.to(self.dtype)

    def squared_norms(self) -> Tensor:
        self.record_norms(list(self.stashed), list(self.stashed.values()))
        return super().squared_norms()

    def apply(self, coefficients: list[float]) -> None:
        targets = [target for target in self.targets if target in self.stashed]
        self.update(targets, [self.stashed.pop(target) for target in targets], coefficients)
        self.updater.flush()


class HostStash(Schedule):
    """A stash in pinned host memory: offloading overlaps with backward, and fetching overlaps with the updates."""

    keeps_gradients = True

    def __init__(self, updater: Updater, clipping: Clipping, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        numel = sum(target.numel for target in updater.targets)
        self.pinned = PinnedMemory(updater.device, numel * (dtype or torch.bfloat16).itemsize)
        self.transfer = HostTransfer(updater.device)
        self.buffers: dict[Target, Tensor] = {}  # pinned buffers, allocated when a target's gradient first arrives
        self.stashed: set[Target] = set()
        self.prefetcher = Prefetcher(self.transfer, self._stashed_buffer)  # the order repeats in every micro-batch
        super().__init__(updater, clipping)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.stashed.clear()
        self._flush_copies()  # an interrupted step may have left copies in flight

    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        for target in targets:
            self.prefetcher.announce(target)
        sums = [self._add(target, gradient) for target, gradient in zip(targets, gradients, strict=True)]
        self.record_norms(targets, sums)  # now, while the sums are on the device

    def flush(self) -> None:
        super().flush()
        self._flush_copies()

    def apply(self, coefficients: list[float]) -> None:
        targets = [target for target in self.targets if target in self.stashed]
        waiting: list[Target] = []  # update in batches, so that the store can prefetch shards too
        gradients: list[Tensor] = []
        nbytes = 0  # of the batch, with padding: all ranks must form the same batches
        fetched = self.transfer.fetch(self.buffers[target] for target in targets)
        for target in targets:
            waiting.append(target)
            gradients.append(next(fetched))  # no local variable, which would keep the tensor alive during the next copy
            nbytes += self.updater.padded_numel(target) * gradients[-1].itemsize
            if target is targets[-1] or nbytes >= IN_FLIGHT_BYTES:
                self.update(waiting, gradients, coefficients)
                waiting, gradients, nbytes = [], [], 0
        self.updater.flush()

    def _add(self, target: Target, gradient: Tensor) -> Tensor:
        """Add a gradient to the stashed one, start offloading the sum and return the sum."""
        if target in self.stashed:
            total = self.prefetcher.take(target).float().add_(gradient)
        else:
            total = gradient.to(self.dtype or gradient.dtype)
        buffer = self.buffers.get(target)
        if buffer is None or buffer.dtype != total.dtype:
            buffer = self.buffers[target] = self.pinned.empty_like(total)
        self.transfer.offload(total, buffer)
        self.stashed.add(target)
        return total

    def _stashed_buffer(self, target: Target) -> Tensor | None:
        return self.buffers[target] if target in self.stashed else None

    def _flush_copies(self) -> None:
        self.prefetcher.flush()
        self.transfer.flush()
