"""Memory layout of eight-bit weights; quantize, dequantize and update by the fastest method of the device.

The codes and scales of a tensor share one buffer, scales first, so that one copy or collective moves both.
"""

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div, clamp_, norms
from lomo_ds.numerics.int8 import eager
from lomo_ds.numerics.int8.eager import BLOCK, Noise, block_count

logger = logging.getLogger(__name__)

SCALE_BYTES = torch.bfloat16.itemsize
ALIGNMENT = 16  # bytes, of codes and of consecutive buffers: the widest load of a GPU


class Blocks(NamedTuple):
    """Views of eight-bit weights: one tensor, to read or update, or several equally long tensors, to read."""

    codes: Tensor  # int8, 1-D; 2-D with a row for each of several tensors
    scales: Tensor  # bfloat16, one for each block of codes
    number: int  # unique within a model, so that no two tensors are rounded with the same noise

    def part(self, start: int, stop: int) -> "Blocks":
        """Return views of the weights [start, stop) of one tensor; ``start`` is a multiple of ``BLOCK``."""
        assert start % BLOCK == 0
        scales = self.scales[start // BLOCK : block_count(stop)]
        return Blocks(self.codes[start:stop], scales, self.number)


Values = Tensor | Blocks  # values of a shard: 1-D, contiguous, any float dtype; or eight-bit weights


def is_quantizable(shape: torch.Size) -> bool:
    """Return whether a parameter of this shape is stored in eight bits: matrices are, small vectors are not."""
    return len(shape) >= 2


def scale_bytes(numel: int) -> int:
    """Return the bytes of the scales of ``numel`` weights, which are at the beginning of a buffer."""
    return SCALE_BYTES * block_count(numel)


def quantized_bytes(numel: int) -> int:
    """Return the bytes of a buffer with the codes and scales of ``numel`` weights."""
    return _start_of_codes(numel) + ceil_div(numel, ALIGNMENT) * ALIGNMENT


def quantize_flat(values: Tensor) -> Tensor:
    """Quantize 1-D ``values`` (any float dtype) to nearest, into a new int8 buffer on the same device."""
    buffer = torch.empty(quantized_bytes(values.numel()), dtype=torch.int8, device=values.device)
    quantize_into(buffer, values)
    return buffer


def quantize_into(buffer: Tensor, values: Tensor) -> None:
    """Quantize 1-D ``values`` to nearest into ``buffer``, which is on the same device."""
    codes, scales, _ = view_blocks(buffer, values.numel())
    (kernel_for(values.device) or eager).encode(values, (codes, scales))


def view_blocks(buffer: Tensor, numel: int, number: int = 0) -> Blocks:
    """Return views of the codes and scales in a buffer of ``numel`` weights, or in several buffers, one a row."""
    start = _start_of_codes(numel)
    scales = buffer[..., : scale_bytes(numel)].view(torch.bfloat16)
    return Blocks(buffer[..., start : start + numel], scales, number)


def dequantize(blocks: Blocks, out: Tensor) -> None:
    """Dequantize into ``out``: contiguous, any float dtype, of the shape of the codes; each weight is rounded once."""
    kernel = kernel_for(out.device)
    if kernel is not None:
        kernel.decode(blocks.codes, blocks.scales, out)
        return
    matrices = zip(*map(torch.atleast_2d, (blocks.codes, blocks.scales, out)), strict=True)
    for codes, scales, written in matrices:
        eager.decode(codes, scales, out.dtype, written)


def update(
    blocks: Blocks,
    direction: Tensor,
    factor: float | Tensor,
    decay: float | Tensor,
    noise: Noise | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """Update as ``eager.update_``; see ``kernel.update`` for ``limit`` and ``squares``. May overwrite ``direction``."""
    kernel = kernel_for(direction.device)
    if kernel is not None:
        kernel.update(blocks.codes, blocks.scales, direction, factor, decay, noise, limit, squares)
        return
    if squares is not None:
        squares.zero_()[:1] = norms([direction])[0].square()
    if limit is not None:
        clamp_(direction, limit)
    eager.update_(blocks.codes, blocks.scales, direction, factor, decay, noise)


def _start_of_codes(numel: int) -> int:
    return ceil_div(scale_bytes(numel), ALIGNMENT) * ALIGNMENT


@functools.cache
def kernel_for(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels, tested once; None without a GPU, or, with a warning, if Triton does not work."""
    if device.type != "cuda":
        return None
    try:
        from lomo_ds.numerics.int8 import kernel

        ones = torch.ones(1, dtype=torch.bfloat16, device=device)
        codes, scales = kernel.encode(ones)
        squares = torch.empty(1, dtype=torch.float32, device=device)
        kernel.update(codes, scales, ones, 1.0, 1.0, Noise(0, 0, 0), None, squares)
        kernel.decode(codes, scales, ones)
    except Exception as error:  # missing Triton or C compiler, unsupported GPU: each raises its own exception type
        logger.warning("eight-bit weights take several passes over memory because Triton fails: %s", error)
        return None
    return kernel
