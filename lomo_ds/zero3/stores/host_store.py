"""Store of shards in host memory: updated in the copy that backward has gathered on the device, then copied back."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, HostTransfer
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.gathering import layer_of
from lomo_ds.zero3.shard import Shard


def max_offload_bytes(sizes: Mapping[str, int]) -> int:
    """Return the limit on updated shards that wait for the link: those of the largest decoder layer.

    Backward computes the gradients of a layer faster than the link moves them, all at once where micro-batches are
    accumulated inside the layers, and then, while it recomputes the next layer, none.

    Args:
        sizes: bytes of each shard, by the name of its parameter.
    """
    layers: Counter[str | None] = Counter()
    for name, size in sizes.items():
        layers[layer_of(name)] += size
    del layers[None]
    return max([IN_FLIGHT_BYTES, *layers.values()])


class HostStore:
    """Store that lends this rank's part of an offered gathered copy, or else a device copy of the shard.

    Args:
        shards: in host memory; if it is pinned, copies overlap with computation.
        device: the compute device.
        gathered_is_lossy: whether gathered copies have been rounded on the way, so that they must not be updated.
            Gathered copies of eight-bit weights always are.
    """

    in_place = False

    def __init__(self, shards: Sequence[Shard], device: torch.device, gathered_is_lossy: bool = False) -> None:
        self.shards = {shard.name: shard for shard in shards}
        self.numbers = {shard.name: number for number, shard in enumerate(shards)}  # of eight-bit weights' noise
        self.gathered_is_lossy = gathered_is_lossy
        self.transfer = HostTransfer(device, max_offload_bytes({shard.name: shard.storage.nbytes for shard in shards}))
        self.prefetcher: Prefetcher[str] = Prefetcher(self.transfer, self._host_tensor)
        self.gathered: dict[str, Tensor] = {}
        self.lent: dict[str, Tensor] = {}

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Implement ``Store.offer_gathered_weight``."""
        shard = self.shards[name]
        if self.gathered_is_lossy or shard.data.dtype != weight.dtype or weight.numel() != shard.shape.numel():
            return
        part = weight.detach().reshape(-1)[shard.start : shard.stop]
        # clone, since a view would keep the full copy alive
        self.gathered[name] = part if part.numel() == weight.numel() else part.clone()

    def announce(self, names: Sequence[str]) -> None:
        """Implement ``Store.announce``."""
        for name in names:
            if name not in self.gathered:
                self.prefetcher.announce(name)

    def lend(self, name: str) -> Values:
        """Implement ``Store.lend``."""
        copy = self.gathered.pop(name) if name in self.gathered else self.prefetcher.take(name)
        self.lent[name] = copy
        return self.shards[name].values(self.numbers[name], copy) if copy.dtype == torch.int8 else copy

    def commit(self, name: str) -> None:
        """Implement ``Store.commit``."""
        self.transfer.offload(self.lent.pop(name), self._host_tensor(name))

    def flush(self) -> None:
        """Implement ``Store.flush``."""
        self.gathered.clear()
        self.lent.clear()
        self.prefetcher.flush()
        self.transfer.flush()

    def _host_tensor(self, name: str) -> Tensor:
        """Return a shard in host memory: floats without padding, or the buffer of eight-bit codes and scales."""
        shard = self.shards[name]
        return shard.storage if shard.data.dtype == torch.int8 else shard.data
