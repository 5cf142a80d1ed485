"""The protocol of an update rule: pure math over tensors, without hooks, ranks or DeepSpeed."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Rule(Protocol):
    """Turns a parameter shard and its gradient into the new shard."""

    def update(
        self,
        shards: Sequence[Tensor],
        gradients: Sequence[Tensor],
        coefficient: float | Tensor,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Write the updated parameter into ``shard``.

        Args:
            shard: 1-D, the parameter's dtype, on the device where parameters are kept.
            gradient: 1-D, as long as ``shard``, on the device that computes; any float dtype.
            coefficient: what the gradient is multiplied by first (averaging, unscaling, clipping); a float or
                a 0-dim tensor.
            lr: learning rate.
            weight_decay: decoupled weight decay (arXiv 1711.05101).
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of this rank's rule, by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` had returned."""
        ...
