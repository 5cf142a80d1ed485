"""Slices of a flattened (row-major) matrix as 2-D blocks, so that row and column statistics need no index tensors."""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class MatrixBlock(NamedTuple):
    """A rectangle of one matrix that is contiguous in a slice.

    Attributes:
        start, stop: elements of the slice, relative to its beginning.
        matrix: index of the matrix; more than 0 only for tensors of three or more dimensions.
        row, column: first row, counted over all matrices, and first column.
        rows, columns: size.
    """

    start: int
    stop: int
    matrix: int
    row: int
    column: int
    rows: int
    columns: int


def matrix_blocks(shape: torch.Size, start: int, stop: int) -> Iterator[MatrixBlock]:
    """Split elements [start, stop) of a flattened tensor into blocks: partial rows, and runs of whole rows.

    Args:
        shape: of the full tensor; the last two dimensions are a matrix, earlier ones count matrices.
    """
    matrix_rows, columns = shape[-2:]
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        matrix = row // matrix_rows
        whole_rows = (stop - position) // columns if column == 0 else 0
        if whole_rows:
            rows, width = min(whole_rows, (matrix + 1) * matrix_rows - row), columns
        else:
            rows, width = 1, min(columns - column, stop - position)
        end = position + rows * width
        yield MatrixBlock(position - start, end - start, matrix, row, column, rows, width)
        position = end
