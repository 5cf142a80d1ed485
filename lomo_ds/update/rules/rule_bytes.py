"""What a rule declares for a plan: the bytes it holds from step to step, and those its update takes in passing."""

from collections.abc import Callable

import torch

from lomo_ds.numerics.flat import CPU_PIECE_NUMEL
from lomo_ds.numerics.square_sums import slots_of

Temporaries = Callable[[int], int]  # bytes in passing of an update of so many elements

# update_half on a piece, when it rounds: exact values, their bits with noise added, the noise, and the result
HALF_BYTES_PER_ELEMENT = 4 + 4 + 2 + 2


def sgd_state_bytes(numel: int) -> int:
    """Of so many parameters, on a rank: SGD holds none."""
    return 0


def square_sums_bytes(numel: int) -> int:
    """Of a shard of so many elements, where a kernel adds up the squares of its gradient; see ``SquareSums``."""
    return torch.float32.itemsize * slots_of(numel)


def sgd_temporaries(dtype: torch.dtype, device: str) -> Temporaries:
    """Of ``Sgd.update`` for shards of ``dtype``: none in fp32, nor where a kernel writes in one pass over memory."""
    if dtype == torch.float32 or device != "cpu":
        return lambda numel: 0
    return lambda numel: HALF_BYTES_PER_ELEMENT * min(numel, CPU_PIECE_NUMEL)
