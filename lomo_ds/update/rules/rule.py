"""Protocol of an update rule: pure math on tensors, independent of hooks, ranks and DeepSpeed."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.square_sums import SquareSums


class Rule(Protocol):
    """Updates parameter shards from their gradients."""

    def update(
        self,
        shards: Sequence[Values],
        gradients: Sequence[Tensor],
        coefficient: float | Tensor,
        lr: float,
        weight_decay: float,
        limit: float | None = None,
        squares: SquareSums | None = None,
    ) -> None:
        """Write the updated parameters into ``shards``, without making the host wait for the device.

        Args:
            shards: parameter shards on the compute device.
            gradients: one gradient per shard, with the same length and device; any float dtype. Overwritten.
            coefficient: factor for the gradients (averaging, unscaling, clipping); a float or a 0-dim tensor.
            lr: learning rate.
            weight_decay: decoupled weight decay (arXiv 1711.05101).
            limit: maximum magnitude that gradient elements are clamped to before scaling; None does not clamp.
            squares: the result of ``square_sums``, which receives the sums of squares of the gradients before
                clamping; requires ``coefficient`` to be a float. None computes no sums.
        """
        ...

    def square_sums(self, numels: Sequence[int], device: torch.device) -> SquareSums | None:
        """Allocate a step's sums of squares; None if ``update`` cannot compute them on this device.

        Args:
            numels: elements of each gradient of a step.
            device: the device the gradients are computed on.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of this rank's rule that a checkpoint must save, by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` has returned."""
        ...
