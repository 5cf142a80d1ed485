"""Shards in host memory: updated on the device in the copy that backward has gathered, and sent home from there."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.host_memory import HostTransfer
from lomo_ds.numerics import GPU_PIECE_NUMEL
from lomo_ds.rules import Values
from lomo_ds.zero3 import Shard


class InHostMemory:
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
        self.at_hand: dict[int, Tensor] = {}

    def note_whole(self, index: int, whole: Tensor) -> None:
        """See ``Store.note_whole``."""
        shard = self.shards[index]
        if self.rounded or shard.data.dtype != whole.dtype or whole.numel() != shard.shape.numel():
            return
        part = whole.detach().reshape(-1)[shard.start : shard.stop]
        # a view would keep all of it
        self.at_hand[index] = part if part.numel() == whole.numel() else part.clone()

    def lend(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """See ``Store.lend``."""
        away: list[tuple[int, Tensor, Tensor]] = []
        for index, gradient in zip(indices, gradients, strict=True):
            if index in self.at_hand:
                part = self.at_hand.pop(index)
                yield [part], [gradient]
                self.transfer.offload(part, self.shards[index].data)
            else:
                away += [(index, *of_piece) for of_piece in self._pieces(index, gradient)]
        arriving = self.transfer.fetch(home for _, home, _ in away)
        for (index, home, gradient), copy in zip(away, arriving, strict=True):
            yield [self.shards[index].values(index, copy) if copy.dtype == torch.int8 else copy], [gradient]
            self.transfer.offload(copy, home)

    def flush(self) -> None:
        """See ``Store.flush``."""
        self.at_hand.clear()
        self.transfer.flush()

    def _pieces(self, index: int, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A shard and its gradient in parts of bounded length; eight-bit weights in one, half as long."""
        shard = self.shards[index]
        if shard.data.dtype == torch.int8:
            return iter([(shard.kept, gradient)])
        return zip(shard.data.split(GPU_PIECE_NUMEL), gradient.split(GPU_PIECE_NUMEL), strict=True)
