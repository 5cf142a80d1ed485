"""Stochastic rounding of fp32 values to half precision."""

import math

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

_FP16_SMALLEST_NORMAL = 2.0**-14


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round fp32 ``values`` to ``dtype`` up or down at random, so that the expected result is the value itself.

    A value between two neighbours a < b of ``dtype`` becomes b with probability (value - a) / (b - a);
    representable values, inf and nan come back unchanged. Below 2 ** -14, where
    float16 is subnormal, its probabilities are multiples of 2 ** -13. ``generator`` is on the device of ``values``.

    Raises:
        ValueError: ``dtype`` is neither bfloat16 nor float16.
    """
    noise = _random_int16(values, generator)
    if dtype == torch.bfloat16:
        rounded = _clear_low_bits(values, noise, 16)
    elif dtype == torch.float16:
        # adding ``lift`` moves a subnormal value to where fp32 has exactly 13 bits more than float16
        lift = (values.abs() < _FP16_SMALLEST_NORMAL).float().mul_(_FP16_SMALLEST_NORMAL).copysign_(values)
        rounded = _clear_low_bits(values + lift, noise >> 3, 13).sub_(lift)
    else:
        raise ValueError(f"stochastic rounding is defined for bfloat16 and float16, got {dtype}")
    return rounded.masked_fill_(values.isnan(), math.nan).to(dtype)


def _random_int16(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return one int16 of random bits for each element, drawn as int64, which takes a generator no longer."""
    words = torch.empty(ceil_div(like.numel(), 4), dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]


def _clear_low_bits(values: Tensor, noise: Tensor, count: int) -> Tensor:
    """Add signed ``noise`` of ``count`` bits, shifted to be unsigned, then clear those bits; a carry rounds up."""
    bits = noise.int().add_(1 << (count - 1)).add_(values.view(torch.int32))
    return bits.bitwise_and_(-(1 << count)).view(torch.float32)
