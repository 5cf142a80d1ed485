"""Eight-bit weights as they lie in memory, read and updated there by the fastest way that the device has.

Codes and scales of a tensor share one buffer, scales first, so that one copy or collective moves both.
"""

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div, clamp_, norms
from lomo_ds.numerics.int8 import eager
from lomo_ds.numerics.int8.eager import Noise, block_count

logger = logging.getLogger(__name__)

SCALE_BYTES = torch.bfloat16.itemsize
ALIGNMENT = 16  # of codes, and of one buffer behind another: the widest load of a GPU


class Blocks(NamedTuple):
    """Weights in eight bits, to be changed in place; or several tensors as long, each a row, to be read."""

    codes: Tensor  # int8, 1-D; 2-D of several tensors
    scales: Tensor  # bfloat16, one for each block of codes
    number: int  # another for each tensor of a model, so that no two are rounded with the same noise


Values = Tensor | Blocks  # of a shard: 1-D and contiguous of any float dtype, or eight-bit weights


def is_quantizable(shape: torch.Size) -> bool:
    """Whether a parameter of this shape is kept in eight bits: matrices are, the few numbers of norms are not."""
    return len(shape) >= 2


def scale_bytes(numel: int) -> int:
    """Bytes at the beginning of a buffer, which may be of more weights than these ``numel``."""
    return SCALE_BYTES * block_count(numel)


def quantized_bytes(numel: int) -> int:
    """Bytes of the codes and scales of ``numel`` weights."""
    return _start_of_codes(numel) + ceil_div(numel, ALIGNMENT) * ALIGNMENT


def quantize_flat(values: Tensor) -> Tensor:
    """The nearest eight-bit weights to 1-D ``values`` of any float dtype, as a new int8 buffer on their device."""
    buffer = torch.empty(quantized_bytes(values.numel()), dtype=torch.int8, device=values.device)
    quantize_into(buffer, values)
    return buffer


def quantize_into(buffer: Tensor, values: Tensor) -> None:
    """Write the nearest eight-bit weights to 1-D ``values`` into a buffer on their device."""
    codes, scales, _ = view_blocks(buffer, values.numel())
    (kernel_for(values.device) or eager).encode(values, (codes, scales))


def view_blocks(buffer: Tensor, numel: int, number: int = 0) -> Blocks:
    """What lies in the buffer of ``numel`` weights, or in several, each a row; the same memory."""
    start = _start_of_codes(numel)
    scales = buffer[..., : scale_bytes(numel)].view(torch.bfloat16)
    return Blocks(buffer[..., start : start + numel], scales, number)


def dequantize(blocks: Blocks, out: Tensor) -> None:
    """Write the weights, each rounded once from fp32, into ``out``: contiguous, of any float dtype, as the codes."""
    kernel = kernel_for(out.device)
    if kernel is not None:
        kernel.decode(blocks.codes, blocks.scales, out)
        return
    rows = zip(*map(torch.atleast_2d, (blocks.codes, blocks.scales, out)), strict=True)
    for codes, scales, written in rows:
        eager.decode(codes, scales, out.dtype, written)


def update(
    blocks: Blocks,
    gradient: Tensor,
    factor: float | Tensor,
    decay: float,
    noise: Noise | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """See ``eager.update_``, and ``kernel.update`` for ``limit`` and ``squares``; ``gradient`` may be clobbered."""
    kernel = kernel_for(gradient.device)
    if kernel is not None:
        kernel.update(blocks.codes, blocks.scales, gradient, factor, decay, noise, limit, squares)
        return
    if squares is not None:
        squares.zero_()[:1] = norms([gradient])[0].square()
    if limit is not None:
        clamp_(gradient, limit)
    eager.update_(blocks.codes, blocks.scales, gradient, factor, decay, noise)


def _start_of_codes(numel: int) -> int:
    return ceil_div(scale_bytes(numel), ALIGNMENT) * ALIGNMENT


@functools.cache
def kernel_for(device: torch.device) -> ModuleType | None:
    """Triton's kernels, tried once; None off the GPU, and, with a warning, where Triton does not work."""
    if device.type != "cuda":
        return None
    try:
        from lomo_ds.numerics.int8 import kernel

        ones = torch.ones(1, dtype=torch.bfloat16, device=device)
        codes, scales = kernel.encode(ones)
        squares = torch.empty(1, dtype=torch.float32, device=device)
        kernel.update(codes, scales, ones, 1.0, 1.0, Noise(0, 0, 0), None, squares)
        kernel.decode(codes, scales, ones)
    except Exception as error:  # no Triton, no C compiler, a GPU it does not know: each has an exception of its own
        logger.warning("eight-bit weights take several passes over memory, for Triton fails: %s", error)
        return None
    return kernel
