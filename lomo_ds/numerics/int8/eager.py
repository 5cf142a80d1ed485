"""Weights in eight bits: blocks of neighbours, each with codes from -127 to 127 and one scale that they are times of.

Pure functions over tensors. Nothing here knows of ranks, parameters or schedules.
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

BLOCK = 64  # rounding adds noise in proportion to scales, and the fewer values share one, the smaller it is
LARGEST = 127  # the largest code; the smallest is -127
# A block's scale is renewed where its largest value does not fit, or has become less than this share of what would.
# A renewed one is rounded up to bfloat16: enough room, up to 1 / 128, for most blocks to keep theirs for many steps.
SHRINK = 0.5
SMALLEST_SCALE = 2.0**-126  # the smallest normal number: codes times it are exact in fp32

# Noise follows a Weyl sequence modulo 2 ** 16: odd, and nearest to 2 ** 16 over the golden ratio.
GOLDEN = 40503
WINDOW = 256  # steps after which it begins anew, so that no rhythm of the data falls in with it


class Noise(NamedTuple):
    """Which random numbers round an update: the same three give the same numbers on the same kind of device.

    Where a weight begins its sequence of them is random, so those of one step are uniform and independent; but from
    step to step a weight's numbers are spread evenly. Its rounding errors then make up for one another instead of
    adding up like a random walk's.
    """

    seed: int  # of the run, below 2 ** 64
    shard: int  # another for each tensor, below 2 ** 32
    step: int  # of this tensor's updates, counted from 0

    @property
    def window(self) -> int:
        return self.step // WINDOW

    @property
    def shift(self) -> int:
        """What is added, modulo 2 ** 16, to where a weight began."""
        return self.step * GOLDEN & 0xFFFF

    def generator(self, device: torch.device) -> torch.Generator:
        """Draws where weights begin: at every step of a window the same."""
        digest = hashlib.sha256(repr((self.seed, self.shard, self.window)).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]))


def block_count(numel: int) -> int:
    """How many blocks, and so scales, there are for ``numel`` values; the last may be short."""
    return ceil_div(numel, BLOCK)


def encode(values: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The nearest codes of 1-D ``values`` of any float dtype; the largest magnitude of a block gets code 127.

    No finite value moves by more than half its block's scale, which is the largest magnitude over 127, rounded to
    bfloat16, and at least 2 ** -126. What ``decode`` returns in fp32 is encoded as it was. A block with an inf or a
    nan in it decodes to nan as a whole; and 127 scales may be 1 / 512 above the largest magnitude, so that what is as
    near as that to the largest number of a dtype decodes to inf.

    Args:
        out: where the results go; by default new tensors.

    Returns:
        int8 codes, as many as values, and bfloat16 scales, one for each block; both on the device of ``values``.
    """
    codes, scales = out or empty_like(values)
    for some, few, exact in _rows(codes, scales, values):
        exact = exact.float()
        largest = exact.abs().amax(1)
        few.copy_(_scales_or_nan(largest * (1 / LARGEST), largest))
        _write_nearest(some, few, exact / few.float().unsqueeze(1))
    return codes, scales


def empty_like(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales for as many, holding anything."""
    codes = torch.empty_like(values, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, torch.empty(block_count(values.numel()), dtype=torch.bfloat16, device=values.device)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Each code times its block's scale, exact in fp32 and rounded once to ``dtype``.

    Args:
        out: 1-D, contiguous, of ``dtype``, as long as ``codes``; by default a new tensor.
    """
    out = torch.empty_like(codes, dtype=dtype) if out is None else out
    assert out.dtype == dtype
    for some, few, written in _rows(codes, scales, out):
        torch.mul(some, few.float().unsqueeze(1), out=written)
    return out


def update_(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor,
    factor: float | Tensor,
    decay: float,
    noise: Noise | None,
) -> None:
    """Write ``decay * weight - factor * gradient``, each rounded up or down at random, so that the mean is the value.

    Every product and difference is rounded to fp32 for itself. A block keeps its scale as long as its values fit and do
    not shrink below ``SHRINK`` of what would: on an unchanged scale a value that has not changed keeps its code, and
    only values that have changed add noise, while a renewed scale rounds every value of the block anew. No value is
    clipped. Probabilities come in steps of 2 ** -16. A block with an inf or a nan in it decodes to nan as a whole.

    Args:
        gradient: 1-D, contiguous, of any float dtype, as long as ``codes`` and on their device.
        factor: a float, or a 0-dim fp32 tensor on the same device.
        noise: None rounds to nearest.
    """
    generator = noise and noise.generator(codes.device)
    for some, few, theirs in _rows(codes, scales, gradient):
        exact = some * few.float().unsqueeze(1)
        if decay != 1:
            exact.mul_(decay)
        exact.sub_(theirs.float() * factor)
        _requantize_rows(some, few, exact, noise and _drawn(noise, exact, generator))


def _requantize_rows(codes: Tensor, scales: Tensor, exact: Tensor, noise: Tensor | None) -> None:
    """Of blocks in rows, (blocks, their length); ``exact`` is clobbered."""
    scales.copy_(_kept_or_renewed(scales, exact.abs().amax(1)))
    exact.div_(scales.float().unsqueeze(1))
    if noise is not None:
        exact.add_(noise).floor_()
    _write_nearest(codes, scales, exact)


def _kept_or_renewed(scales: Tensor, largest: Tensor) -> Tensor:
    """The bfloat16 scales of blocks whose largest magnitudes have become ``largest``, fp32."""
    limit = scales.float() * LARGEST
    keeps = (largest <= limit) & (largest >= limit * SHRINK)
    up = ((largest * (1 / LARGEST)).view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(keeps, scales, _scales_or_nan(up, largest))


def _scales_or_nan(wanted: Tensor, largest: Tensor) -> Tensor:
    """``wanted``, fp32, to the nearest of bfloat16, where ``largest`` is finite; not too small to divide by."""
    return wanted.clamp(min=SMALLEST_SCALE).masked_fill_(~largest.isfinite(), math.nan).bfloat16()


def _write_nearest(codes: Tensor, scales: Tensor, multiples: Tensor) -> None:
    """Round and store. What is a multiple of nan has no code, so it gets 0; the scale tells."""
    multiples.round_().clamp_(-LARGEST, LARGEST)  # a scale's own rounding may leave 127 too little
    codes.copy_(multiples.masked_fill_(scales.isnan().unsqueeze(1), 0.0))


def _drawn(noise: Noise, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of the 2 ** 16 midpoints of (0, 1) for each, fp32. Generators are as fast with 64 bits as with fewer."""
    words = torch.empty(ceil_div(like.numel(), 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    shifted = bits.add_(noise.shift - (noise.shift >> 15 << 16))  # int16 wraps around
    return shifted.float().add_(2**15 + 0.5).mul_(2.0**-16).view_as(like)


def _rows(codes: Tensor, scales: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Walk them together: codes and values with a block a row, a bounded number of elements at a time."""
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
