"""Sums of squared gradients that update kernels write, and from which the gradient norm of a step is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

PROGRAM_NUMEL = 8192  # elements of a gradient that one program of an update kernel reads


def program_count(numel: int) -> int:
    """Return the number of kernel programs, each of which writes one sum, for a gradient of ``numel`` elements."""
    return ceil_div(numel, PROGRAM_NUMEL)


class SquareSums:
    """Buffer of the sums of one step, in launch order, which follows backward and is the same in every run.

    Args:
        numels: lengths of the gradients of a step: each as a kernel receives it, or in multiples of ``PROGRAM_NUMEL``.
        device: device of the gradients.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        self.sums = torch.empty(sum(map(program_count, numels)), dtype=torch.float32, device=device)
        self.views: dict[
            tuple[int, int], Tensor
        ] = {}  # cached, since slicing is slow and every step needs the same views
        self.used = 0

    def clear(self) -> None:
        """Discard the sums of a step."""
        self.used = 0

    def take(self, numel: int) -> Tensor:
        """Return the slots for the next gradient, which has ``numel`` elements; the kernel writes all of them."""
        start, self.used = self.used, self.used + program_count(numel)
        if (start, self.used) not in self.views:
            assert self.used <= len(self.sums), "more gradients than a step has"
            self.views[start, self.used] = self.sums[start : self.used]
        return self.views[start, self.used]

    def total(self) -> Tensor:
        """Return the total as 0-dim float64; inf or nan if a gradient was."""
        return self.sums[: self.used].sum(dtype=torch.float64)
