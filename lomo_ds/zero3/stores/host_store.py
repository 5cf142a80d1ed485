"""Shards in host memory: updated on the device in the copy that backward has gathered, and sent home from there."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.memory.host_memory import HostTransfer
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.numerics.flat import GPU_PIECE_NUMEL
from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard

Piece = tuple[int, int]  # index of a shard, and number of its piece


class HostStore:
    """Lends this rank's part of a gathered copy where one was noted, else a copy of the shard, a piece at a time.

    Args:
        shards: in host memory; where it is pinned, copies run beside what is computed.
        device: the one that computes.
        rounded: whether gathered copies have lost something on their way, and are no good to be updated. Those of
            eight-bit weights have in any case.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, rounded: bool = False) -> None:
        self.shards = shards
        self.rounded = rounded
        self.transfer = HostTransfer(device)
        self.pieces = [_pieces_of(shard) for shard in shards]
        self.ahead: Prefetcher[Piece] = Prefetcher(self.transfer, lambda piece: self.pieces[piece[0]][piece[1]])
        self.at_hand: dict[int, Tensor] = {}

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        """See ``Store.offer_gathered_weight``."""
        shard = self.shards[index]
        if self.rounded or shard.data.dtype != whole.dtype or whole.numel() != shard.shape.numel():
            return
        part = whole.detach().reshape(-1)[shard.start : shard.stop]
        # a view would keep all of it
        self.at_hand[index] = part if part.numel() == whole.numel() else part.clone()

    def lend(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """See ``Store.lend``."""
        fetched: list[tuple[Piece, Tensor]] = []
        for index, gradient in zip(indices, gradients, strict=True):
            if index in self.at_hand:
                part = self.at_hand.pop(index)
                yield [part], [gradient]
                self.transfer.offload(part, self.shards[index].data)
            else:
                parts = gradient.split(GPU_PIECE_NUMEL) if len(self.pieces[index]) > 1 else [gradient]
                fetched += [((index, number), part) for number, part in enumerate(parts)]
        for piece, _ in fetched:
            self.ahead.announce(piece)
        for (index, number), part in fetched:
            copy = self.ahead.take((index, number))
            yield [self.shards[index].values(index, copy) if copy.dtype == torch.int8 else copy], [part]
            self.transfer.offload(copy, self.pieces[index][number])

    def flush(self) -> None:
        """See ``Store.flush``."""
        self.at_hand.clear()
        self.ahead.flush()
        self.transfer.flush()


def _pieces_of(shard: Shard) -> Sequence[Tensor]:
    """A shard in parts of bounded length; eight-bit weights in one, half as long."""
    return [shard.kept] if shard.data.dtype == torch.int8 else shard.data.split(GPU_PIECE_NUMEL)
