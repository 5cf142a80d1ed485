"""Arithmetic on flat shards: norms, pieces of bounded length, and rounding to half precision.

Pure functions over tensors. Nothing here knows of ranks, parameters or schedules.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The longest piece, and so a bound on every temporary below whatever the size of a shard: on a GPU 32 MiB of fp32, to
# keep it busy; on a CPU 1 MiB, which stays in its cache.
GPU_PIECE_NUMEL = 2**23
CPU_PIECE_NUMEL = 2**18

_FP16_SMALLEST_NORMAL = 2.0**-14


def norms(values: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each of ``values`` (any float dtype), as 0-dim fp32 tensors; inf or nan if any element is."""
    return list(torch._foreach_norm(list(values), 2, dtype=torch.float32)) if values else []


def clamp_(values: Tensor, limit: float) -> None:
    """Clamp to [-limit, limit] in place; a ``limit`` that the dtype cannot hold is its largest number."""
    limit = min(limit, torch.finfo(values.dtype).max)
    values.clamp_(-limit, limit)


def pieces(*flat: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Walk lists of equally long 1-D tensors together, a bounded number of elements at a time.

    Yields as many lists of views as were given: of several tensors that are short together, or of a part of one that
    is long. The device of the last list's first tensor decides how many elements are many.
    """
    limit = CPU_PIECE_NUMEL if flat[-1] and flat[-1][0].device.type == "cpu" else GPU_PIECE_NUMEL
    short: list[tuple[Tensor, ...]] = []
    total = 0
    for row in zip(*flat, strict=True):
        numel = row[0].numel()
        if short and total + numel > limit:
            yield tuple(map(list, zip(*short, strict=True)))
            short, total = [], 0
        if numel > limit:
            yield from (tuple([part] for part in parts) for parts in zip(*(t.split(limit) for t in row), strict=True))
        else:
            short.append(row)
            total += numel
    if short:
        yield tuple(map(list, zip(*short, strict=True)))


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round fp32 ``values`` to ``dtype`` up or down at random, so that the mean is the value itself.

    A value between two neighbours a < b of ``dtype`` becomes b with probability (value - a) / (b - a);
    representable values, inf and nan come back unchanged. Below 2 ** -14, where the steps of float16 stop getting
    smaller, its probabilities come in steps of 2 ** -13. ``generator`` lives on the device of ``values``.

    Raises:
        ValueError: ``dtype`` is neither bfloat16 nor float16.
    """
    noise = _random_int16(values, generator)
    if dtype == torch.bfloat16:
        rounded = _clear_low_bits(values, noise, 16)
    elif dtype == torch.float16:
        # raised by it, a value lies where fp32 has 13 bits more than float16 has for the value itself
        lift = (values.abs() < _FP16_SMALLEST_NORMAL).float().mul_(_FP16_SMALLEST_NORMAL).copysign_(values)
        rounded = _clear_low_bits(values + lift, noise >> 3, 13).sub_(lift)
    else:
        raise ValueError(f"stochastic rounding is defined for bfloat16 and float16, got {dtype}")
    return rounded.masked_fill_(values.isnan(), math.nan).to(dtype)


def _random_int16(like: Tensor, generator: torch.Generator) -> Tensor:
    """An int16 for each element, every bit random: generators are as fast with 64 bits as with fewer."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]


def _clear_low_bits(values: Tensor, noise: Tensor, count: int) -> Tensor:
    """Add ``noise``, of ``count`` bits with sign, less its smallest; then clear as many: a carry is a step up."""
    bits = noise.int().add_(1 << (count - 1)).add_(values.view(torch.int32))
    return bits.bitwise_and_(-(1 << count)).view(torch.float32)
