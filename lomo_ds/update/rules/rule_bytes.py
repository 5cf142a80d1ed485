"""Memory of an update rule, for the planner: its persistent state and the temporaries of an update, in bytes."""

from collections.abc import Callable

import torch

from lomo_ds.numerics.flat import CPU_PIECE_NUMEL
from lomo_ds.numerics.square_sums import program_count

Temporaries = Callable[[int], int]  # maps the number of updated elements to the bytes of temporaries

# update_half with stochastic rounding: fp32 values, their bits with noise added, the noise, and the result
HALF_BYTES_PER_ELEMENT = 4 + 4 + 2 + 2


def sgd_state_bytes(numel: int) -> int:
    """Return the state bytes of SGD for ``numel`` parameters: 0, because SGD is stateless."""
    return 0


def square_sums_bytes(numel: int) -> int:
    """Return the bytes of a shard's ``SquareSums`` when a kernel computes them during the update."""
    return torch.float32.itemsize * program_count(numel)


def sgd_temporaries(dtype: torch.dtype, device: str) -> Temporaries:
    """Return the temporaries of ``Sgd.update``: none for fp32 shards, and none if a kernel updates in one pass."""
    if dtype == torch.float32 or device != "cpu":
        return lambda numel: 0
    return lambda numel: HALF_BYTES_PER_ELEMENT * min(numel, CPU_PIECE_NUMEL)
