"""Keep this rank's gradient shards until the global norm is known: exact clipping and accumulation in one pass."""

import torch
from torch import Tensor

from lomo_ds.clipping import Clipping
from lomo_ds.rules import Rule
from lomo_ds.schedules.base import Schedule, Target


class Stash(Schedule):
    """One pass; a world-size-th of all gradients is alive at the end of backward.

    On the device that computes, a shard is kept as it arrives and freed with the step, so that the stash grows
    as activations go. In host memory the buffers are pinned, and allocated once.

    Args:
        stash_device: where the shards are kept.
        dtype: what they are kept in; None keeps the gradients' own until a second one is added, in float32.
    """

    keeps_gradients = True

    def __init__(
        self,
        targets: list[Target],
        rule: Rule,
        clipping: Clipping,
        device: torch.device,
        stash_device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(targets, rule, clipping, device)
        self.device = device
        self.stash_device = stash_device
        self.dtype = dtype
        self.held: dict[int, Tensor] = {}
        self.host_buffers: dict[int, Tensor] = {}

    def start(self, scale: float) -> None:
        super().start(scale)
        self.held.clear()

    def take(self, index: int, gradient: Tensor) -> None:
        if index in self.held:
            self.held[index] = self.held[index].float().add_(gradient.to(self.stash_device))
        elif self.stash_device == self.device:
            self.held[index] = gradient.to(self.dtype or gradient.dtype)
        else:
            self.held[index] = self._host_buffer(index, gradient).copy_(gradient)

    def measure(self) -> Tensor:
        for index, gradient in self.held.items():
            self.add_to_norm(index, gradient.to(self.device))
        return self.squared_norms

    def apply(self, coefficients: list[float]) -> None:
        for index in sorted(self.held):
            gradient = self.held.pop(index).to(self.device)
            self.update(index, gradient, coefficients[self.targets[index].group])

    def _host_buffer(self, index: int, gradient: Tensor) -> Tensor:
        if index not in self.host_buffers:
            self.host_buffers[index] = torch.empty(
                gradient.shape, dtype=self.dtype or gradient.dtype, device=self.stash_device, pin_memory=True
            )
        return self.host_buffers[index]
