"""How shards travel to where they are gathered: as they are kept, or in eight bits."""

import torch
from torch import Tensor

from lomo_ds import int8


class AsKept:
    """The ``zero3.Wire`` of shards that lie in host memory, or are eight-bit weights; these become floats on arrival.

    Args:
        device: the one that computes.
        copies: whether floats are copied where they lie on the device too: on the CPU, which is its own host.
    """

    def __init__(self, device: torch.device, copies: bool = False) -> None:
        self.device = device
        self.copies = copies

    def pack(self, shard: Tensor) -> Tensor:
        """See ``Wire.pack``."""
        is_here = shard.device.type == self.device.type
        if is_here and (shard.dtype == torch.int8 or not self.copies):
            return shard  # it is not written to before ``Gathering.refresh`` has waited for all that reads it
        return torch.empty_like(shard, device=self.device, pin_memory=False).copy_(shard, non_blocking=True)

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Wire.unpack``."""
        if packed.dtype != torch.int8:
            return packed.view(-1)
        whole = torch.empty(len(packed) * numel, dtype=dtype, device=packed.device)
        for buffer, part in zip(packed, whole.split(numel), strict=True):
            int8.read(int8.blocks_in(buffer, numel), part)
        return whole


class Quantized(AsKept):
    """Shards of half precision that travel in eight bits, rounded to nearest each time (``zero_quantized_weights``)."""

    def pack(self, shard: Tensor) -> Tensor:
        """See ``Wire.pack``."""
        kept = shard if shard.device.type == self.device.type else super().pack(shard)
        return int8.buffer_of(kept) if kept.dtype != torch.int8 and kept.numel() >= int8.BLOCK else kept
