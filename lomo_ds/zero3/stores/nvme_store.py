"""Store of shards on NVMe: updated in the copy that backward has gathered on the device, then written to the file."""

from collections.abc import Sequence

import torch

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
        self.slots = {shard.name: shard.slot for shard in shards if shard.slot is not None}
        self.device = device
        for slot in self.slots.values():
            slot.space.max_leaving_bytes = self.transfer.max_offload_bytes

    def announce(self, names: Sequence[str]) -> None:
        """Implement ``Store.announce``."""
        super().announce([name for name in names if name not in self.slots])
        slots = [self.slots[name] for name in names if name in self.slots and name not in self.gathered]
        if slots:
            slots[0].space.expect(slots)

    def lend(self, name: str) -> Values:
        """Implement ``Store.lend``."""
        if name not in self.slots:
            return super().lend(name)
        part = self.gathered.pop(name, None)
        if part is None:
            part = self.slots[name].read(self.shards[name].data.numel(), self.device)
        self.lent[name] = part
        return part

    def commit(self, name: str) -> None:
        """Implement ``Store.commit``."""
        if name in self.slots:
            self.slots[name].write(self.lent.pop(name))
        else:
            super().commit(name)

    def flush(self) -> None:
        """Implement ``Store.flush``: wait for the pending writes, which keep device memory alive."""
        super().flush()
        for space in {slot.space for slot in self.slots.values()}:
            space.finish()
