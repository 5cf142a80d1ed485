"""Store of shards in host memory: updated in the copy that backward has gathered on the device, then copied back."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import HostTransfer
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.numerics.flat import GPU_PIECE_NUMEL
from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard

Piece = tuple[str, int]  # name of a parameter, and number of a piece of its shard


class HostStore:
    """Store that updates this rank's part of an offered gathered copy, or else a device copy of the shard, in pieces.

    Args:
        shards: in host memory; if it is pinned, copies overlap with computation.
        device: the compute device.
        gathered_is_lossy: whether gathered copies have been rounded on the way, so that they must not be updated.
            Gathered copies of eight-bit weights always are.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, gathered_is_lossy: bool = False) -> None:
        self.shards = {shard.name: shard for shard in shards}
        self.numbers = {shard.name: number for number, shard in enumerate(shards)}  # of eight-bit weights' noise
        self.gathered_is_lossy = gathered_is_lossy
        self.transfer = HostTransfer(device)
        self.pieces = {shard.name: _pieces_of(shard) for shard in shards}
        self.prefetcher: Prefetcher[Piece] = Prefetcher(self.transfer, lambda piece: self.pieces[piece[0]][piece[1]])
        self.gathered: dict[str, Tensor] = {}

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Implement ``Store.offer_gathered_weight``."""
        shard = self.shards[name]
        if self.gathered_is_lossy or shard.data.dtype != weight.dtype or weight.numel() != shard.shape.numel():
            return
        part = weight.detach().reshape(-1)[shard.start : shard.stop]
        # clone, since a view would keep the full copy alive
        self.gathered[name] = part if part.numel() == weight.numel() else part.clone()

    def open_for_update(
        self, names: Sequence[str], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Implement ``Store.open_for_update``."""
        fetched: list[tuple[Piece, Tensor]] = []
        for name, gradient in zip(names, gradients, strict=True):
            if name in self.gathered:
                part = self.gathered.pop(name)
                yield [part], [gradient]
                self.transfer.offload(part, self.shards[name].data)
            else:
                parts = gradient.split(GPU_PIECE_NUMEL) if len(self.pieces[name]) > 1 else [gradient]
                fetched += [((name, number), part) for number, part in enumerate(parts)]
        for piece, _ in fetched:
            self.prefetcher.announce(piece)
        for (name, number), part in fetched:
            copy = self.prefetcher.take((name, number))
            yield [self.shards[name].values(self.numbers[name], copy) if copy.dtype == torch.int8 else copy], [part]
            self.transfer.offload(copy, self.pieces[name][number])

    def flush(self) -> None:
        """Implement ``Store.flush``."""
        self.gathered.clear()
        self.prefetcher.flush()
        self.transfer.flush()


def _pieces_of(shard: Shard) -> Sequence[Tensor]:
    """Return a shard in pieces of bounded length; eight-bit weights are a single piece."""
    return [shard.storage] if shard.data.dtype == torch.int8 else shard.data.split(GPU_PIECE_NUMEL)
