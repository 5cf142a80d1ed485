"""Keep this rank's gradient shards until the global norm is known: exact clipping and accumulation in one pass."""

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, HostTransfer, PinnedMemory
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.rules import Rule
from lomo_ds.update.schedules.schedule import Schedule, Target
from lomo_ds.zero3.stores import Store


class Stash(Schedule):
    """One pass; a world-size-th of all gradients is alive on the device at the end of backward.

    A shard is kept as it arrives and freed with the step, so that the stash grows as activations go.

    Args:
        dtype: what shards are kept in; None keeps the gradients' own until a second one is added, in float32.
    """

    keeps_gradients = True

    def __init__(
        self,
        targets: list[Target],
        store: Store,
        rule: Rule,
        clipping: Clipping,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        self.held: dict[int, Tensor] = {}
        super().__init__(targets, store, rule, clipping, device)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.held.clear()

    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        for index, gradient in zip(indices, gradients, strict=True):
            if index in self.held:
                self.held[index] = self.held[index].float().add_(gradient)
            else:
                self.held[index] = gradient if self.dtype is None else gradient.to(self.dtype)

    def measure(self) -> Tensor:
        self.note_norms(list(self.held), list(self.held.values()))
        return super().measure()

    def apply(self, coefficients: list[float]) -> None:
        indices = sorted(self.held)
        self.update(indices, [self.held.pop(index) for index in indices], coefficients)


class HostStash(Schedule):
    """The same in pinned host memory; copies there run beside backward, and those back beside the updates."""

    keeps_gradients = True

    def __init__(
        self,
        targets: list[Target],
        store: Store,
        rule: Rule,
        clipping: Clipping,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        numel = sum(target.numel for target in targets)
        self.pinned = PinnedMemory(device, numel * (dtype or torch.bfloat16).itemsize)
        self.transfer = HostTransfer(device)
        self.buffers: dict[int, Tensor] = {}  # each cut when its target's gradient first comes
        self.held: set[int] = set()
        self.ahead = Prefetcher(self.transfer, self._held_buffer)  # micro-batches bring gradients in the same order
        super().__init__(targets, store, rule, clipping, device)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.held.clear()
        self._flush_copies()  # there is something left where a step was cut short

    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        for index in indices:
            self.ahead.announce(index)
        sums = [self._add(index, gradient) for index, gradient in zip(indices, gradients, strict=True)]
        self.note_norms(indices, sums)  # here, where they lie on the device

    def flush(self) -> None:
        super().flush()
        self._flush_copies()

    def apply(self, coefficients: list[float]) -> None:
        indices = sorted(self.held)
        waiting: list[int] = []  # updated some at a time, so that a store can fetch their shards ahead too
        gradients: list[Tensor] = []
        arriving = self.transfer.fetch(self.buffers[index] for index in indices)
        for index in indices:
            waiting.append(index)
            gradients.append(next(arriving))  # in no variable of its own, which would keep it during the next copy
            if index == indices[-1] or sum(held.nbytes for held in gradients) >= IN_FLIGHT_BYTES:
                self.update(waiting, gradients, coefficients)
                waiting, gradients = [], []

    def _add(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of the step so far, which is on its way to host memory."""
        if index in self.held:
            total = self.ahead.take(index).float().add_(gradient)
        else:
            total = gradient.to(self.dtype or gradient.dtype)
        buffer = self.buffers.get(index)
        if buffer is None or buffer.dtype != total.dtype:
            buffer = self.buffers[index] = self.pinned.like(total)
        self.transfer.offload(total, buffer)
        self.held.add(index)
        return total

    def _held_buffer(self, index: int) -> Tensor | None:
        return self.buffers[index] if index in self.held else None

    def _flush_copies(self) -> None:
        self.ahead.flush()
        self.transfer.flush()
