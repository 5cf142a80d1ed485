"""Keep this rank's gradient shards until the global norm is known: exact clipping and accumulation in one pass."""

import torch
from torch import Tensor

from lomo_ds.clipping import Clipping
from lomo_ds.host_memory import IN_FLIGHT_BYTES, HostTransfer, PinnedMemory
from lomo_ds.rules import Rule
from lomo_ds.schedules.base import Schedule, Target
from lomo_ds.stores import Store


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
        super().__init__(targets, store, rule, clipping, device)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.held.clear()
        self.transfer.flush()  # there is something left where a step was cut short

    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        sums = [self._sum(index, gradient) for index, gradient in zip(indices, gradients, strict=True)]
        self.note_norms(indices, sums)  # here, where they lie on the device
        for index, gradient in zip(indices, sums, strict=True):
            buffer = self.buffers.get(index)
            if buffer is None or buffer.dtype != gradient.dtype:
                buffer = self.buffers[index] = self.pinned.like(gradient)
            self.transfer.offload(gradient, buffer)
        self.held.update(indices)

    def flush(self) -> None:
        super().flush()
        self.transfer.flush()

    def apply(self, coefficients: list[float]) -> None:
        indices = sorted(self.held)
        waiting: list[int] = []  # updated some at a time, so that a store can fetch their shards ahead too
        gradients: list[Tensor] = []
        arriving = self.transfer.fetch(self.buffers[index] for index in indices)
        for index, gradient in zip(indices, arriving, strict=True):
            waiting.append(index)
            gradients.append(gradient)
            if index == indices[-1] or sum(held.nbytes for held in gradients) >= IN_FLIGHT_BYTES:
                self.update(waiting, gradients, coefficients)
                waiting, gradients = [], []

    def _sum(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of the step so far."""
        if index not in self.held:
            return gradient.to(self.dtype or gradient.dtype)
        (sum_so_far,) = self.transfer.fetch([self.buffers[index]])
        return sum_so_far.float().add_(gradient)
