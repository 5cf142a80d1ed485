"""Store of shards on NVMe: updated in the copy that backward has gathered on the device, then written to the file."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard
from lomo_ds.zero3.stores.host_store import HostStore


class NvmeStore(HostStore):
    """``HostStore`` whose large shards are in a swap file; small shards remain in host memory.

    The host waits for reads, and for a write if all buffers are in use.

    Args:
        device: the compute device.
        gathered_is_lossy: see ``HostStore``.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, gathered_is_lossy: bool = False) -> None:
        super().__init__(shards, device, gathered_is_lossy)
        self.slots = {shard.name: shard.slot for shard in shards}
        self.device = device

    def open_for_update(
        self, names: Sequence[str], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Implement ``Store.open_for_update``."""
        pairs = list(zip(names, gradients, strict=True))
        in_memory = [(name, gradient) for name, gradient in pairs if self.slots[name] is None]
        yield from super().open_for_update([name for name, _ in in_memory], [gradient for _, gradient in in_memory])
        for name, gradient in pairs:
            slot = self.slots[name]
            if slot is not None:
                part = self.gathered.pop(name, None)
                if part is None:
                    part = slot.read(gradient.numel(), self.device)
                yield [part], [gradient]
                slot.write(part)

    def flush(self) -> None:
        """Implement ``Store.flush``: wait for the pending writes, which keep device memory alive."""
        super().flush()
        for space in {slot.space for slot in self.slots.values() if slot is not None}:
            space.finish()
