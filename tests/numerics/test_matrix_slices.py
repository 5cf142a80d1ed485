"""Blocks of matrix slices: they cover each element once and in order, and give torch's row and column sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.numerics.matrix_slices import MatrixBlock, matrix_blocks

SHAPES = st.one_of(st.tuples(*[st.integers(1, 7)] * 2), st.tuples(*[st.integers(1, 5)] * 3))


@st.composite
def slices(draw: st.DrawFn) -> tuple[torch.Size, int, int]:
    """Draw the shape of one or several matrices, and a slice of its elements, which may be empty."""
    shape = draw(SHAPES)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return torch.Size(shape), start, stop


def coordinates(shape: torch.Size, block: MatrixBlock) -> Tensor:
    """Return (matrix, row of the matrix, column) of each element of a block, in the order of memory."""
    row = block.row - block.matrix * shape[-2]
    rows, columns = torch.arange(row, row + block.rows), torch.arange(block.column, block.column + block.columns)
    return torch.cartesian_prod(torch.tensor([block.matrix]), rows, columns)


@settings(deadline=None, max_examples=200)
@given(drawn=slices())
def test_blocks_cover_each_element_once_and_in_order(drawn: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = drawn
    blocks = list(matrix_blocks(shape, start, stop))
    position = 0
    for block in blocks:
        assert block.start == position < block.stop, "no gap, no overlap, no empty block"
        position = block.stop
    assert position == stop - start
    covered = torch.cat([coordinates(shape, block) for block in blocks] or [torch.empty(0, 3, dtype=torch.int64)])
    matrices, rows, columns = math.prod(shape[:-2]), *shape[-2:]
    every = torch.cartesian_prod(torch.arange(matrices), torch.arange(rows), torch.arange(columns))
    assert torch.equal(covered, every[start:stop])


@settings(deadline=None, max_examples=200)
@given(drawn=slices())
def test_a_block_does_not_cross_a_matrix(drawn: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = drawn
    rows, columns = shape[-2:]
    for block in matrix_blocks(shape, start, stop):
        assert block.stop - block.start == block.rows * block.columns
        assert block.matrix * rows <= block.row < block.row + block.rows <= (block.matrix + 1) * rows
        assert 0 <= block.column < block.column + block.columns <= columns
        assert block.rows == 1 or block.columns == columns, "several rows are contiguous only if they are whole"


@settings(deadline=None, max_examples=200)
@given(drawn=slices())
def test_a_slice_has_few_blocks(drawn: tuple[torch.Size, int, int]) -> None:
    """At most two partial rows, and one run of whole rows for each matrix."""
    shape, start, stop = drawn
    assert len(list(matrix_blocks(shape, start, stop))) <= 2 + math.prod(shape[:-2])


@settings(deadline=None, max_examples=200)
@given(drawn=slices())
def test_sums_over_blocks_are_those_of_the_reshaped_tensor(drawn: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = drawn
    values = torch.randint(-8, 9, (shape.numel(),), generator=torch.Generator().manual_seed(0)).double()
    rows, columns, matrices = shape[:-1].numel(), shape[-1], shape[:-2].numel()
    row_sums, column_sums = torch.zeros(rows, dtype=torch.float64), torch.zeros(matrices, columns, dtype=torch.float64)
    part = values[start:stop]
    for block in matrix_blocks(shape, start, stop):
        rectangle = part[block.start : block.stop].view(block.rows, block.columns)
        row_sums[block.row : block.row + block.rows] += rectangle.sum(1)
        column_sums[block.matrix, block.column : block.column + block.columns] += rectangle.sum(0)
    outside = torch.ones(shape.numel(), dtype=torch.bool)
    outside[start:stop] = False
    whole = values.masked_fill(outside, 0.0).view(shape)
    assert torch.equal(row_sums.view(shape[:-1]), whole.sum(-1))
    assert torch.equal(column_sums.view(*shape[:-2], columns), whole.sum(-2))


@pytest.mark.parametrize(
    ("shape", "start", "stop", "expected"),
    [
        ((3, 4), 0, 12, [MatrixBlock(0, 12, 0, 0, 0, 3, 4)]),
        ((3, 4), 5, 7, [MatrixBlock(0, 2, 0, 1, 1, 1, 2)]),
        ((3, 4), 6, 11, [MatrixBlock(0, 2, 0, 1, 2, 1, 2), MatrixBlock(2, 5, 0, 2, 0, 1, 3)]),
        ((2, 2, 3), 3, 9, [MatrixBlock(0, 3, 0, 1, 0, 1, 3), MatrixBlock(3, 6, 1, 2, 0, 1, 3)]),
    ],
)
def test_known_blocks(shape: tuple[int, ...], start: int, stop: int, expected: list[MatrixBlock]) -> None:
    assert list(matrix_blocks(torch.Size(shape), start, stop)) == expected
