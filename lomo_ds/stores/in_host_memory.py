"""Shards in host memory: updated on the device in the copy that backward has gathered, and sent home from there."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lomo_ds.host_memory import Ferry
from lomo_ds.numerics import GPU_PIECE_NUMEL


class InHostMemory:
    """Lends this rank's part of a gathered copy where one was noted, else a copy of the shard, a piece at a time.

    Args:
        shards: 1-D, in host memory; pinned, copies run beside what is computed.
        starts: where each begins in its flattened parameter.
        device: the one that computes.
    """

    def __init__(self, shards: Sequence[Tensor], starts: Sequence[int], device: torch.device) -> None:
        self.shards = shards
        self.starts = starts
        self.ferry = Ferry(device)
        self.at_hand: dict[int, Tensor] = {}

    def note_whole(self, index: int, whole: Tensor) -> None:
        """See ``Store.note_whole``."""
        numel = self.shards[index].numel()
        part = whole.detach().reshape(-1).narrow(0, min(self.starts[index], whole.numel() - numel), numel)
        # a view would keep all of it; and where nothing is left for this rank it would keep it for nothing
        self.at_hand[index] = part if numel == whole.numel() else part.clone()

    def lend(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """See ``Store.lend``."""
        away: list[tuple[Tensor, Tensor]] = []
        for index, gradient in zip(indices, gradients, strict=True):
            if index in self.at_hand:
                part = self.at_hand.pop(index)
                yield [part], [gradient]
                self.ferry.down(part, self.shards[index])
            else:
                homes = self.shards[index].split(GPU_PIECE_NUMEL)
                away += zip(homes, gradient.split(GPU_PIECE_NUMEL), strict=True)
        arriving = self.ferry.up(home for home, _ in away)
        for (home, gradient), part in zip(away, arriving, strict=True):
            yield [part], [gradient]
            self.ferry.down(part, home)

    def flush(self) -> None:
        """See ``Store.flush``."""
        self.at_hand.clear()
        self.ferry.flush()


class FromHostMemory:
    """The ``zero3.Wire`` of shards in host memory: as they are, over the link and then from rank to rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pack(self, shard: Tensor) -> Tensor:
        """See ``Wire.pack``."""
        return torch.empty_like(shard, device=self.device, pin_memory=False).copy_(shard, non_blocking=True)

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Wire.unpack``."""
        return packed.view(-1)
