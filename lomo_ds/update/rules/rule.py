"""The protocol of an update rule: pure math over tensors, without hooks, ranks or DeepSpeed."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.square_sums import SquareSums


class Rule(Protocol):
    """Turns parameter shards and their gradients into the new shards."""

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
        """Write the updated parameters into ``shards``. The host does not wait for the device.

        Args:
            shards: on the device that computes.
            gradients: each as long as its shard, on the same device; any float dtype. Clobbered.
            coefficient: what gradients are multiplied by first (averaging, unscaling, clipping); a float or
                a 0-dim tensor.
            lr: learning rate.
            weight_decay: decoupled weight decay (arXiv 1711.05101).
            limit: magnitude that elements of gradients are clamped to before all else; None for none.
            squares: from ``square_sums``: to be given the sums of squares of the gradients as they come, before they
                are clamped. ``coefficient`` is a float then.
        """
        ...

    def square_sums(self, numels: Sequence[int], device: torch.device) -> SquareSums | None:
        """Room for a step's sums of squares where ``update`` adds them up as it reads gradients; else None.

        Args:
            numels: of all gradients of a step.
            device: where they are computed.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of this rank's rule, by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` had returned."""
        ...
