"""Operations on flat (1-D) tensors: lengths, norms, clamping, and iteration in pieces of bounded length."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The longest piece, and so a bound on every temporary below whatever the size of a shard: on a GPU 32 MiB of fp32, to
# keep it busy; on a CPU 1 MiB, which stays in its cache.
GPU_PIECE_NUMEL = 2**23
CPU_PIECE_NUMEL = 2**18


def ceil_div(dividend: int, divisor: int) -> int:
    """Return ``dividend / divisor``, rounded up to a whole number."""
    return -(-dividend // divisor)


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
