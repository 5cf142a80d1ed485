"""Operations on flat (1-D) tensors: lengths, norms, clamping, and iteration in pieces of bounded length."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Largest piece, which bounds the temporaries below for shards of any size: 32 MiB of fp32 on a GPU, enough to keep it
# busy; 1 MiB on a CPU, which fits its cache.
GPU_PIECE_NUMEL = 2**23
CPU_PIECE_NUMEL = 2**18


def ceil_div(dividend: int, divisor: int) -> int:
    """Return ``dividend / divisor``, rounded up to a whole number."""
    return -(-dividend // divisor)


def norms(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor (any float dtype) as a 0-dim fp32 tensor; inf or nan if an element is."""
    return list(torch._foreach_norm(list(values), 2, dtype=torch.float32)) if values else []


def clamp_(values: Tensor, limit: float) -> None:
    """Clamp to [-limit, limit] in place; a ``limit`` beyond the range of the dtype becomes its largest number."""
    limit = min(limit, torch.finfo(values.dtype).max)
    values.clamp_(-limit, limit)


def pieces(*flat: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Iterate over lists of equally long 1-D tensors in parallel, a bounded number of elements at a time.

    Yields one list of views for each input list: views of several short tensors, or of one part of a long tensor. The
    device of the first tensor in the last list decides the bound.
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
