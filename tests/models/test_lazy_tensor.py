"""Tests of lazy tensors: any piece of a result is equal to torch's, and only the needed elements are read."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.models.lazy_tensor import LazyTensor
from lomo_ds.models.sources import Stored, boxes_of_range, stored_names

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "merged experts": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([c, c])], dim=1),
    "stacked and transposed": lambda a, b, c: torch.stack([a, b, c], -1).transpose(0, 1).contiguous(),
    "permuted for rotary": lambda a, b, c: a.view(2, 3, 1, 2, 5).transpose(1, 2).reshape(2, -1)[:, 3:9],
    "in another dtype": lambda a, b, c: a.to(torch.bfloat16),
    "a chunk of joined columns": lambda a, b, c: torch.chunk(torch.cat([a, b], 1), 3, dim=1)[1].T,
    "split in unequal parts": lambda a, b, c: torch.split(b, [1, 3, 2])[1],
    "unbound and put together": lambda a, b, c: (
        torch.stack(a.unbind(0)[::-1]).unflatten(1, (5, 2)).movedim(0, -1)[:, 1]
    ),
    "one row": lambda a, b, c: c[3].unsqueeze(0).squeeze(),
    "every other row": lambda a, b, c: a[::2],
    "computed": lambda a, b, c: (a + b)[2:5],
}


def stored(values: Tensor, name: str, read: list[int]) -> LazyTensor:
    """A stored tensor that records the length of each read."""

    def copy_piece(start: int, out: Tensor) -> None:
        read.append(out.numel())
        out.copy_(values.reshape(-1)[start : start + out.numel()])

    return LazyTensor(Stored(values.shape, values.dtype, name, copy_piece))


def three(read: list[int]) -> tuple[list[Tensor], list[LazyTensor]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    return values, [stored(value, name, read) for value, name in zip(values, "abc", strict=True)]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_piece_equals_torch(function: Function) -> None:
    read: list[int] = []
    values, lazy = three(read)
    result, expected = function(*lazy), function(*values)
    assert isinstance(result, LazyTensor)
    assert not read
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(result.source.read_whole(), expected)
    flat = expected.reshape(-1)
    for start in range(0, len(flat), 3):
        for stop in range(start, len(flat) + 1, 4):
            piece = torch.full((stop - start,), torch.nan)
            result.source.copy_flat(start, piece)
            assert torch.equal(piece, flat[start:stop].float())


def test_all_ranks_read_each_element_of_merged_experts_once() -> None:
    read: list[int] = []
    _, (a, b, c) = three(read)
    merged = torch.cat([torch.stack([a, b]), torch.stack([b, c])], dim=1)
    assert isinstance(merged, LazyTensor)
    for rank in range(5):
        merged.source.copy_flat(rank * 48, torch.empty(48))
    assert sum(read) == merged.numel()
    assert list(stored_names(merged.source)) == ["a", "b", "b", "c"]


def test_functions_that_compute_values() -> None:
    _, (a, b, _) = three([])
    assert torch.equal(a, a.clone())
    assert not torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="writes to a tensor that has not been read yet"):
        a.add_(1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_cover_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    flat = torch.arange(torch.Size(shape).numel())
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    boxes = list(boxes_of_range(shape, start, stop))
    pieces = [flat.view(shape)[tuple(slice(*bounds) for bounds in box)].reshape(-1) for box in boxes]
    assert [int(number) for piece in pieces for number in piece] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape))
