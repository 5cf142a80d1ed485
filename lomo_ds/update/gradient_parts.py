"""Parts of a summed gradient: the elements that each rank receives of it."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div
from lomo_ds.update.target import Target


class Parts(NamedTuple):
    """Elements of a flattened tensor that the ranks receive: one slice each.

    Attributes:
        bounds: start and stop of each rank's slice.
        padded: elements of the largest slice.
        overlap: whether two ranks may receive the same elements.
    """

    bounds: list[tuple[int, int]]
    padded: int
    overlap: bool

    def as_rows(self, flat: Tensor) -> Tensor:
        """Return a row for each rank's slice, padded with zeros; a view if there is nothing to pad."""
        if self.overlap:
            rows = [flat[start:stop] for start, stop in self.bounds]
            return torch.stack([torch.nn.functional.pad(row, (0, self.padded - row.numel())) for row in rows])
        padding = self.padded * len(self.bounds) - flat.numel()
        return (torch.nn.functional.pad(flat, (0, padding)) if padding else flat).view(len(self.bounds), -1)


def parts_of(target: Target, reduced_numel: int, world_size: int) -> Parts:
    """Return the parts of a gradient: the ranks' slices of the parameter, or the rows of a projection they belong to.

    Args:
        reduced_numel: elements of the gradient, or of its projection with fewer columns.
    """
    padded = ceil_div(target.full_numel, world_size)
    starts = [min(rank * padded, target.full_numel) for rank in range(world_size + 1)]
    slices = list(pairwise(starts))
    if reduced_numel == target.full_numel:
        return Parts(slices, padded, overlap=False)
    columns = target.shape[-1]
    width = reduced_numel * columns // target.full_numel  # columns of the projection
    bounds = [_rows_of(start, stop, columns, width) for start, stop in slices]
    return Parts(bounds, max(stop - start for start, stop in bounds), overlap=True)


def without_shared_row(target: Target, rows: Tensor) -> Tensor:
    """Return the rows of a projection that this rank receives (flat), without the first if a lower rank has it too."""
    columns = target.shape[-1]
    if target.start % columns == 0 or target.numel == 0:
        return rows
    count = ceil_div(target.stop, columns) - target.start // columns
    return rows[rows.numel() // count :]


def _rows_of(start: int, stop: int, columns: int, width: int) -> tuple[int, int]:
    """Return the elements of a projection whose rows the elements [start, stop) of the parameter have a part of."""
    first = start // columns
    return first * width, (ceil_div(stop, columns) if stop > start else first) * width
