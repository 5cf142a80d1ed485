"""Sources of a tensor's values: a stored tensor, or others concatenated, narrowed or permuted; read piece by piece."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

Box = tuple[tuple[int, int], ...]  # [start, stop) in each dimension
MIN_READ = 4096  # bytes; shorter runs are read together with the bytes between them


@dataclass(frozen=True)
class Source(ABC):
    """The values of one tensor, which are read into host memory on demand."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def read(self, box: Box) -> Tensor:
        """Read the values within ``box``."""

    def read_whole(self) -> Tensor:
        """Read all values."""
        return self.read(tuple((0, size) for size in self.shape))

    def copy_flat(self, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, any dtype and device) with elements of the flattened tensor, beginning at ``start``."""
        filled = 0
        for box in boxes_of_range(self.shape, start, start + out.numel()):
            piece = self.read(box).reshape(-1)
            out[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()


@dataclass(frozen=True)
class Stored(Source):
    """A tensor that is stored under ``name``; ``copy_piece`` implements ``copy_flat``."""

    name: str
    copy_piece: Callable[[int, Tensor], None]

    def read(self, box: Box) -> Tensor:
        """Read each contiguous run of elements, or one range around all of them if the runs are short."""
        sizes = [stop - start for start, stop in box]
        split = max((dim for dim, size in enumerate(sizes) if size != self.shape[dim]), default=0)
        runs, numel = math.prod(sizes[:split]), math.prod(sizes[split:])
        if runs > 1 and numel * self.dtype.itemsize < MIN_READ:
            return _read_around(self, box, self.shape)
        out = torch.empty(sizes, dtype=self.dtype)
        strides = _strides(self.shape)
        firsts = itertools.product(*(range(*bounds) for bounds in box[:split]))
        for piece, first in zip(out.view(runs, numel), firsts, strict=True):
            index = [*first, *(start for start, _ in box[split:])]
            self.copy_piece(sum(i * stride for i, stride in zip(index, strides, strict=True)), piece)
        return out

    def copy_flat(self, start: int, out: Tensor) -> None:
        """Read straight into ``out``."""
        self.copy_piece(start, out)


@dataclass(frozen=True)
class Cast(Source):
    """``source`` in another dtype."""

    source: Source

    def read(self, box: Box) -> Tensor:
        """Read from the source and convert."""
        return self.source.read(box).to(self.dtype)

    def copy_flat(self, start: int, out: Tensor) -> None:
        """Let the source convert directly if ``out`` has this dtype."""
        if out.dtype == self.dtype:
            self.source.copy_flat(start, out)
        else:
            super().copy_flat(start, out)


@dataclass(frozen=True)
class Concatenated(Source):
    """``torch.cat`` of ``parts``."""

    parts: tuple[Source, ...]
    dim: int

    def read(self, box: Box) -> Tensor:
        """Read from the parts that overlap ``box``."""
        pieces, begin = [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = (min(max(bound - begin, 0), size) for bound in box[self.dim])
            if start < stop:
                pieces.append(part.read(_replace_dim(box, self.dim, start, stop)))
            begin += size
        return torch.cat(pieces, self.dim) if pieces else torch.empty([b - a for a, b in box], dtype=self.dtype)

    def copy_flat(self, start: int, out: Tensor) -> None:
        """Read parts that are concatenated in the first dimension directly into ``out``."""
        if self.dim:
            return super().copy_flat(start, out)
        begin, stop = 0, start + out.numel()
        for part in self.parts:
            size = math.prod(part.shape)
            first, last = (min(max(bound - begin, 0), size) for bound in (start, stop))
            if first < last:
                part.copy_flat(first, out[begin + first - start : begin + last - start])
            begin += size
        return None


@dataclass(frozen=True)
class Narrowed(Source):
    """A slice of ``source`` that begins at ``start`` in dimension ``dim``."""

    source: Source
    dim: int
    start: int

    def read(self, box: Box) -> Tensor:
        """Read the box at its offset in the source."""
        start, stop = box[self.dim]
        return self.source.read(_replace_dim(box, self.dim, start + self.start, stop + self.start))


@dataclass(frozen=True)
class Permuted(Source):
    """``source`` with its dimensions in the order ``dims``."""

    source: Source
    dims: tuple[int, ...]

    def read(self, box: Box) -> Tensor:
        """Read the same box in the dimension order of the source."""
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return self.source.read(tuple(box[dim] for dim in inverse)).permute(self.dims)


@dataclass(frozen=True)
class Reshaped(Source):
    """The elements of ``source`` in row-major order, in another shape."""

    source: Source

    def read(self, box: Box) -> Tensor:
        """Read the range of elements around ``box``, which may not be a box in the source's shape."""
        return _read_around(self.source, box, self.shape)


@dataclass(frozen=True)
class Computed(Source):
    """The result of a function that needs its full arguments, which include ``sources``."""

    sources: tuple[Source, ...]
    compute: Callable[[], Tensor]

    def read(self, box: Box) -> Tensor:
        """Compute the full result and slice it."""
        return self.compute()[tuple(slice(*bounds) for bounds in box)]


def stored_names(source: Source) -> Iterator[str]:
    """Yield the names of the stored tensors that a source reads from."""
    if isinstance(source, Stored):
        yield source.name
    for part in vars(source).values():
        for value in part if isinstance(part, tuple) else (part,):
            if isinstance(value, Source):
                yield from stored_names(value)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Split elements ``start`` to ``stop`` of a flattened tensor into boxes, in order: at most two per dimension."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, last = ceil_div(start, inner), stop // inner  # the rows between them are complete
    if start < first * inner:
        yield from _boxes_in_row(shape, first - 1, start, stop)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if first <= last and last * inner < stop:
        yield from _boxes_in_row(shape, last, start, stop)


def _boxes_in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    inner = math.prod(shape[1:])
    for box in boxes_of_range(shape[1:], max(start - row * inner, 0), min(stop - row * inner, inner)):
        yield ((row, row + 1), *box)


def _read_around(source: Source, box: Box, shape: torch.Size) -> Tensor:
    """Read the shortest range of the flattened ``source`` around ``box``, which is a box in ``shape``."""
    sizes = [stop - start for start, stop in box]
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=source.dtype)
    strides = _strides(shape)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    around = torch.empty(last + 1 - first, dtype=source.dtype)
    source.copy_flat(first, around)
    return around.as_strided(sizes, strides)


def _replace_dim(box: Box, dim: int, start: int, stop: int) -> Box:
    return (*box[:dim], (start, stop), *box[dim + 1 :])


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
