"""Shards in a file on NVMe: updated on the device in the copy that backward has gathered, and written from there."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard
from lomo_ds.zero3.stores.host_store import HostStore


class NvmeStore(HostStore):
    """Does so for the shards that lie in a file; the others, which are small, are in host memory.

    The host waits here: for a read, and for a write where more are under way than there are buffers.

    Args:
        device: the one that computes.
        gathered_is_lossy: see ``HostStore``.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, gathered_is_lossy: bool = False) -> None:
        super().__init__(shards, device, gathered_is_lossy)
        self.places = [shard.slot for shard in shards]
        self.device = device

    def open_for_update(
        self, indices: Sequence[int], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """See ``Store.open_for_update``."""
        pairs = list(zip(indices, gradients, strict=True))
        in_memory = [(index, gradient) for index, gradient in pairs if self.places[index] is None]
        yield from super().open_for_update([index for index, _ in in_memory], [gradient for _, gradient in in_memory])
        for index, gradient in pairs:
            place = self.places[index]
            if place is not None:
                part = self.gathered.pop(index, None)
                if part is None:
                    part = place.read(gradient.numel(), self.device)
                yield [part], [gradient]
                place.write(part)

    def flush(self) -> None:
        """See ``Store.flush``: what is not written yet is held on the device."""
        super().flush()
        for space in {place.space for place in self.places if place is not None}:
            space.finish()
