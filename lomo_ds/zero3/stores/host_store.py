"""Store of shards in host memory: updated in the copy that backward has gathered on the device, then copied back."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import HostTransfer
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.numerics.flat import GPU_PIECE_NUMEL
from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard

Piece = tuple[int, int]  # index of a shard, and number of a piece in it


class HostStore:
    """Store that updates this rank's part of an offered gathered copy, or else a device copy of the shard, in pieces.

    Args:
        shards: in host memory; if it is pinned, copies overlap with computation.
        device: the compute device.
        gathered_is_lossy: whether gathered copies have been rounded on the way, so that they must not be updated.
            Gathered copies of eight-bit weights always are.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, gathered_is_lossy: bool = False) -> None:
        self.shards = shards
        self.gathered_is_lossy = gathered_is_lossy
        self.transfer = HostTransfer(device)
        self.pieces = [_pieces_of(shard) for shard in shards]
        self.prefetcher: Prefetcher[Piece] = Prefetcher(self.transfer, lambda piece: self.pieces[piece[0]][piece[1]])
        self.gathered: dict[int, Tensor] = {}

    def offer_gathered_weight(self, index: int, weight: Tensor) -> None:
        """Implement ``Store.offer_gathered_weight``."""
        shard = self.shards[index]
        if self.gathered_is_lossy or shard.data.dtype != weight.dtype or weight.numel() != shard.shape.numel():
            return
        part = weight.detach().reshape(-1)[shard.start : shard.stop]
        # clone, since a view would keep the full copy alive
        self.gathered[index] = part if part.numel() == weight.numel() else part.clone()

    def open_for_update(
        self, indices: Sequence[int], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Implement ``Store.open_for_update``."""
        fetched: list[tuple[Piece, Tensor]] = []
        for index, gradient in zip(indices, gradients, strict=True):
            if index in self.gathered:
                part = self.gathered.pop(index)
                yield [part], [gradient]
                self.transfer.offload(part, self.shards[index].data)
            else:
                parts = gradient.split(GPU_PIECE_NUMEL) if len(self.pieces[index]) > 1 else [gradient]
                fetched += [((index, number), part) for number, part in enumerate(parts)]
        for piece, _ in fetched:
            self.prefetcher.announce(piece)
        for (index, number), part in fetched:
            copy = self.prefetcher.take((index, number))
            yield [self.shards[index].values(index, copy) if copy.dtype == torch.int8 else copy], [part]
            self.transfer.offload(copy, self.pieces[index][number])

    def flush(self) -> None:
        """Implement ``Store.flush``."""
        self.gathered.clear()
        self.prefetcher.flush()
        self.transfer.flush()


def _pieces_of(shard: Shard) -> Sequence[Tensor]:
    """Return a shard in pieces of bounded length; eight-bit weights are a single piece."""
    return [shard.storage] if shard.data.dtype == torch.int8 else shard.data.split(GPU_PIECE_NUMEL)
