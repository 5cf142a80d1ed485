"""Wire formats of gathered shards: as they are stored, or quantized to eight bits."""

import torch
from torch import Tensor

from lomo_ds.numerics import int8


class PlainWireFormat:
    """``WireFormat`` that sends shards as they are stored: floats or eight-bit weights, which become floats on arrival.

    Args:
        device: the compute device.
        copies: whether floats are copied even if they are on the compute device, as with CPU offload on CPU ranks.
    """

    def __init__(self, device: torch.device, copies: bool = False) -> None:
        self.device = device
        self.copies = copies

    def pack(self, shard: Tensor) -> Tensor:
        """Implement ``WireFormat.pack``."""
        on_device = shard.device.type == self.device.type
        if on_device and (shard.dtype == torch.int8 or not self.copies):
            return shard  # not written to before ``Gathering.refresh`` has waited for all readers
        return torch.empty_like(shard, device=self.device, pin_memory=False).copy_(shard, non_blocking=True)

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Implement ``WireFormat.packed_as``."""
        return numel, dtype

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """Implement ``WireFormat.pack_into``."""
        packed.copy_(shard, non_blocking=True)

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Implement ``WireFormat.unpack``."""
        if packed.dtype != torch.int8:
            # a copy unless the parameter has the buffer to itself; ``reshape`` could return a view with gaps
            return packed.contiguous().view(-1)
        whole = torch.empty(len(packed), numel, dtype=dtype, device=packed.device)
        int8.dequantize(int8.view_blocks(packed, numel), whole)
        return whole.view(-1)


class QuantizedWireFormat(PlainWireFormat):
    """``WireFormat`` that sends shards in eight bits, rounded to nearest (``zero_quantized_weights``)."""

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Implement ``WireFormat.packed_as``; quantization would not shrink a shard shorter than a block."""
        if dtype == torch.int8 or numel < int8.BLOCK:
            return numel, dtype
        return int8.quantized_bytes(numel), torch.int8

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """Implement ``WireFormat.pack_into``."""
        if packed.dtype == shard.dtype:
            super().pack_into(packed, shard)
        else:
            int8.quantize_into(packed, self.pack(shard))
