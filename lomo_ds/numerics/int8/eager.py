"""Block quantization in eager PyTorch: a weight is its code (-127 to 127) times the scale of its block.

Pure functions over tensors, independent of ranks, parameters and schedules.
"""

import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lomo_ds.numerics import flat
from lomo_ds.numerics.flat import ceil_div

BLOCK = 64  # elements; rounding noise grows with the scale, and the scale of a smaller block is smaller
LARGEST = 127  # the largest code; the smallest is -127
# A block's scale is renewed if its largest value no longer fits, or has fallen below this share of the largest that
# does. A renewed scale is rounded up to bfloat16, by up to 1 / 128: with that headroom most blocks keep it for many
# steps.
SHRINK = 0.5
SMALLEST_SCALE = 2.0**-126  # smallest normal number: codes times this scale are exact in fp32

# Noise follows a Weyl sequence modulo 2 ** 16; its step is the odd number nearest to 2 ** 16 over the golden ratio.
GOLDEN = 40503
WINDOW = 256  # steps after which the sequence restarts, so that it cannot correlate with a period in the data


class Noise(NamedTuple):
    """Seed of the random numbers that round an update: equal seeds give equal numbers on the same kind of device.

    Each weight starts its sequence at a random point, so the numbers of one step are uniform and independent. From step
    to step the numbers of one weight are spread evenly, so that its rounding errors cancel instead of growing like a
    random walk.
    """

    seed: int  # seed of the run, below 2 ** 64
    shard: int  # unique number of the tensor, below 2 ** 32
    step: int  # number of updates of this tensor so far

    @property
    def window(self) -> int:
        return self.step // WINDOW

    @property
    def shift(self) -> int:
        """Offset from the starting point of each weight's sequence, modulo 2 ** 16."""
        return self.step * GOLDEN & 0xFFFF

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of the starting points, which are the same at every step of a window."""
        digest = hashlib.sha256(repr((self.seed, self.shard, self.window)).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]))


def block_count(numel: int) -> int:
    """Return the number of blocks, and of scales, of ``numel`` values; the last block may be short."""
    return ceil_div(numel, BLOCK)


def encode(values: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantize 1-D ``values`` (any float dtype) to nearest; the largest magnitude of a block gets code 127.

    No finite value moves by more than half its block's scale, which is the largest magnitude over 127, rounded to
    bfloat16, and at least 2 ** -126. Encoding what ``decode`` returns in fp32 gives the same codes and scales. A
    block that contains inf or nan decodes to nan as a whole. 127 times a scale may exceed the largest magnitude by
    1 / 512, so a value that close to the largest number of a dtype decodes to inf.

    Args:
        out: codes and scales to write; by default new tensors.

    Returns:
        int8 codes, one for each value, and bfloat16 scales, one for each block; both on the device of ``values``.
    """
    codes, scales = out or empty_like(values)
    for row_codes, row_scales, exact in _rows(codes, scales, values):
        exact = exact.float()
        largest = exact.abs().amax(1)
        row_scales.copy_(_scales_or_nan(largest * (1 / LARGEST), largest))
        _write_nearest(row_codes, row_scales, exact / row_scales.float().unsqueeze(1))
    return codes, scales


def empty_like(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized codes and scales for ``values``."""
    codes = torch.empty_like(values, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, torch.empty(block_count(values.numel()), dtype=torch.bfloat16, device=values.device)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return each code times its block's scale, exact in fp32 and rounded once to ``dtype``.

    Args:
        out: 1-D, contiguous, of ``dtype``, as long as ``codes``; by default a new tensor.
    """
    out = torch.empty_like(codes, dtype=dtype) if out is None else out
    assert out.dtype == dtype
    for row_codes, row_scales, row_out in _rows(codes, scales, out):
        torch.mul(row_codes, row_scales.float().unsqueeze(1), out=row_out)
    return out


def update_(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor,
    factor: float | Tensor,
    decay: float | Tensor,
    noise: Noise | None,
) -> None:
    """Write ``decay * weight - factor * direction``, rounded stochastically, so that the expected result is the value.

    Every product and difference is rounded to fp32 separately. A block keeps its scale while its largest value fits and
    is at least ``SHRINK`` of the largest that does. With an unchanged scale, a value that has not changed keeps its
    code, so only changed values add noise; a renewed scale rounds every value of the block again. No value is clipped.
    Probabilities are multiples of 2 ** -16. A block that contains inf or nan decodes to nan as a whole.

    Args:
        direction: 1-D, contiguous, any float dtype, as long as ``codes`` and on the same device.
        factor, decay: floats, or 0-dim fp32 tensors on the same device.
        noise: None rounds to nearest.
    """
    generator = noise and noise.generator(codes.device)
    for row_codes, row_scales, row_direction in _rows(codes, scales, direction):
        exact = row_codes * row_scales.float().unsqueeze(1)
        if isinstance(decay, Tensor) or decay != 1:
            exact.mul_(decay)
        exact.sub_(row_direction.float() * factor)
        _requantize_rows(row_codes, row_scales, exact, noise and _draw(noise, exact, generator))


def _requantize_rows(codes: Tensor, scales: Tensor, exact: Tensor, noise: Tensor | None) -> None:
    """Quantize ``exact``, a block a row, into ``codes`` and ``scales``; ``exact`` is overwritten."""
    scales.copy_(_keep_or_renew(scales, exact.abs().amax(1)))
    exact.div_(scales.float().unsqueeze(1))
    if noise is not None:
        exact.add_(noise).floor_()
    _write_nearest(codes, scales, exact)


def _keep_or_renew(scales: Tensor, largest: Tensor) -> Tensor:
    """Return the new bfloat16 scales of blocks whose largest magnitudes are now ``largest`` (fp32)."""
    limit = scales.float() * LARGEST
    keeps = (largest <= limit) & (largest >= limit * SHRINK)
    up = ((largest * (1 / LARGEST)).view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(keeps, scales, _scales_or_nan(up, largest))


def _scales_or_nan(exact: Tensor, largest: Tensor) -> Tensor:
    """Round fp32 scales to bfloat16, large enough to divide by; nan for blocks whose ``largest`` is not finite."""
    return exact.clamp(min=SMALLEST_SCALE).masked_fill_(~largest.isfinite(), math.nan).bfloat16()


def _write_nearest(codes: Tensor, scales: Tensor, multiples: Tensor) -> None:
    """Round to nearest and store as codes; a block whose scale is nan gets zeros."""
    multiples.round_().clamp_(-LARGEST, LARGEST)  # a scale that was rounded down could give 128
    codes.copy_(multiples.masked_fill_(scales.isnan().unsqueeze(1), 0.0))


def _draw(noise: Noise, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one of 2 ** 16 evenly spaced midpoints of (0, 1) for each element, as fp32."""
    # int64 words take a generator no longer than narrower ones
    words = torch.empty(ceil_div(like.numel(), 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    shifted = bits.add_(noise.shift - (noise.shift >> 15 << 16))  # int16 wraps around
    return shifted.float().add_(2**15 + 0.5).mul_(2.0**-16).view_as(like)


def _rows(codes: Tensor, scales: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over codes, scales and values in parallel, a block a row and a bounded number of elements at a time."""
    numel = codes.numel()
    assert codes.shape == values.shape == (numel,)
    assert scales.shape == (block_count(numel),)
    limit = flat.CPU_PIECE_NUMEL if codes.device.type == "cpu" else flat.GPU_PIECE_NUMEL
    whole = numel - numel % BLOCK
    starts = [*range(0, whole, limit - limit % BLOCK), whole]
    for start, end in pairwise(starts):
        yield _block_a_row(codes[start:end]), scales[start // BLOCK : end // BLOCK], _block_a_row(values[start:end])
    if whole < numel:
        yield codes[whole:].view(1, -1), scales[-1:], values[whole:].view(1, -1)


def _block_a_row(flat: Tensor) -> Tensor:
    return flat.view(-1, BLOCK)
