"""The protocol of a store: where this rank's shards are kept, and how they come to be updated."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from lomo_ds.numerics.int8 import Values


class Store(Protocol):
    """Keeps the shards of the parameters that train, by their index in the model's order.

    It knows where the bytes are and in what form; not when a shard is updated, nor how.
    """

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        """A gathered copy of a parameter is on the device, and its shard is lent before the pass is over.

        Args:
            whole: it may be freed or clobbered, but not used again in this pass.
        """
        ...

    def open_for_update(
        self, indices: Sequence[int], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Shards, or parts of them, to be changed in place, with their part of ``gradients``.

        What is lent is on the device that computes; it is kept when the next one is asked for. The host waits for
        no more than a drive.

        Args:
            gradients: each as long as its shard, on the device that computes.
        """
        ...

    def flush(self) -> None:
        """A pass has ended: let go of device memory that is held for copies under way or noted in vain."""
        ...
