"""How shards travel to where they are gathered: as they are kept, or in eight bits."""

import torch
from torch import Tensor

from lomo_ds.numerics import int8


class PlainWireFormat:
    """``WireFormat`` that sends shards as they are stored: floats or eight-bit weights, which become floats on arrival.

    Args:
        device: the one that computes.
        copies: whether floats are copied where they lie on the device too: on the CPU, which is its own host.
    """

    def __init__(self, device: torch.device, copies: bool = False) -> None:
        self.device = device
        self.copies = copies

    def pack(self, shard: Tensor) -> Tensor:
        """See ``WireFormat.pack``."""
        is_here = shard.device.type == self.device.type
        if is_here and (shard.dtype == torch.int8 or not self.copies):
            return shard  # it is not written to before ``Gathering.refresh`` has waited for all that reads it
        return torch.empty_like(shard, device=self.device, pin_memory=False).copy_(shard, non_blocking=True)

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """See ``WireFormat.packed_as``."""
        return numel, dtype

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """See ``WireFormat.pack_into``."""
        packed.copy_(shard, non_blocking=True)

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``WireFormat.unpack``."""
        if packed.dtype != torch.int8:
            # in place, or copied from between other parameters; ``reshape`` would keep a view of rows of one element
            return packed.contiguous().view(-1)
        whole = torch.empty(len(packed), numel, dtype=dtype, device=packed.device)
        int8.dequantize(int8.view_blocks(packed, numel), whole)
        return whole.view(-1)


class QuantizedWireFormat(PlainWireFormat):
    """Shards of half precision that travel in eight bits, rounded to nearest each time (``zero_quantized_weights``)."""

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """See ``WireFormat.packed_as``; what is no longer than a block gains nothing."""
        if dtype == torch.int8 or numel < int8.BLOCK:
            return numel, dtype
        return int8.quantized_bytes(numel), torch.int8

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """See ``WireFormat.pack_into``."""
        if packed.dtype == shard.dtype:
            super().pack_into(packed, shard)
        else:
            int8.quantize_into(packed, self.pack(shard))
