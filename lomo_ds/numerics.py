"""Arithmetic on flat shards: squared norm, bounded fp32 chunks, and rounding to half precision.

Pure functions over tensors. Nothing here knows of ranks, parameters or schedules.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_NUMEL = 2**23  # 32 MiB of fp32: bounds every temporary below, whatever the size of a shard

_FP16_SMALLEST_NORMAL = 2.0**-14
_FP16_STEP_BELOW_NORMAL = 2.0**-24


def norms(values: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, 0-dim float32; inf or nan if any value of it is."""
    return list(torch._foreach_norm(list(values), 2, dtype=torch.float32))


def squared_norm(values: Tensor) -> Tensor:
    """Sum of squares of ``values`` (any float dtype) as a 0-dim float64 tensor; inf or nan if any value is."""
    return torch.linalg.vector_norm(values, dtype=torch.float32).double().square()


def chunks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk equally long 1-D tensors together, in views of at most ``CHUNK_NUMEL`` elements."""
    yield from zip(*(tensor.split(CHUNK_NUMEL) for tensor in flat), strict=True)


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round fp32 ``values`` to ``dtype`` up or down at random, so that the mean is the value itself.

    A value between two neighbours a < b of ``dtype`` becomes b with probability (value - a) / (b - a);
    representable values, inf and nan come back unchanged. ``generator`` lives on the device of ``values``.

    Raises:
        ValueError: ``dtype`` is neither bfloat16 nor float16.
    """
    if dtype == torch.bfloat16:
        rounded = _truncate_with_noise(values, dropped_bits=16, generator=generator)
    elif dtype == torch.float16:
        rounded = torch.where(
            values.abs() < _FP16_SMALLEST_NORMAL,
            _round_on_grid(values, _FP16_STEP_BELOW_NORMAL, generator),
            _truncate_with_noise(values, dropped_bits=13, generator=generator),
        )
    else:
        raise ValueError(f"stochastic rounding is defined for bfloat16 and float16, got {dtype}")
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _truncate_with_noise(values: Tensor, dropped_bits: int, generator: torch.Generator) -> Tensor:
    """Add uniform noise to the bits that ``dtype`` lacks, then clear them: a carry is a step up in magnitude."""
    noise = torch.randint(
        0, 1 << dropped_bits, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << dropped_bits))
    return bits.view(torch.float32)


def _round_on_grid(values: Tensor, step: float, generator: torch.Generator) -> Tensor:
    """Round to multiples of ``step`` (a power of two, so that scaling is exact)."""
    scaled = values / step
    below = scaled.floor()
    noise = torch.rand(values.shape, device=values.device, generator=generator)
    return (below + (noise < scaled - below)) * step
