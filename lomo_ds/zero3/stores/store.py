"""Protocol of stores, which hold this rank's shards and give access to them for updates."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from lomo_ds.numerics.int8 import Values


class Store(Protocol):
    """Holds the shards of the trained parameters, by the parameters' names.

    A store knows where the bytes are and in what format. It does not know when or how a shard is updated.
    """

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Offer a gathered copy of a parameter on the device, whose shard is updated later in the same pass.

        Args:
            weight: the caller may free or overwrite it, but must not use it again in this pass.
        """
        ...

    def open_for_update(
        self, names: Sequence[str], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Yield shards, or pieces of them, to be updated in place, with the matching pieces of ``gradients``.

        The yielded values are on the compute device; the store commits them when the next item is requested. The host
        waits only for reads and writes of a drive.

        Args:
            gradients: each as long as its shard, on the compute device.
        """
        ...

    def flush(self) -> None:
        """End a pass: release device memory held for pending copies and for unused gathered copies."""
        ...
