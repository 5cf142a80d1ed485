"""Sums of squares of gradients, as update kernels leave them where a step's norm is computed from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

PROGRAM_NUMEL = 8192  # elements of a gradient that one program of an update kernel reads


def program_count(numel: int) -> int:
    """How many programs, and so sums, there are for a gradient of so many elements."""
    return ceil_div(numel, PROGRAM_NUMEL)


class SquareSums:
    """The sums of a step in the order of its launches, which is backward's: the same from run to run.

    Args:
        numels: of all gradients of a step, each as it reaches a kernel or a multiple of ``PROGRAM_NUMEL`` of it.
        device: where gradients are computed.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        self.sums = torch.empty(sum(map(program_count, numels)), dtype=torch.float32, device=device)
        self.views: dict[tuple[int, int], Tensor] = {}  # the same at every step, and slow to make
        self.used = 0

    def clear(self) -> None:
        """Forget the sums of a step."""
        self.used = 0

    def take(self, numel: int) -> Tensor:
        """Slots for the sums of a gradient of so many elements, all to be written."""
        start, self.used = self.used, self.used + program_count(numel)
        if (start, self.used) not in self.views:
            assert self.used <= len(self.sums), "a gradient more than a step has"
            self.views[start, self.used] = self.sums[start : self.used]
        return self.views[start, self.used]

    def total(self) -> Tensor:
        """Their sum, 0-dim float64; inf or nan where a gradient was."""
        return self.sums[: self.used].sum(dtype=torch.float64)
