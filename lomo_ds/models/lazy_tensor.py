"""Tensors whose values are read on demand, so that functions that only move values can be traced without reading.

transformers converts the tensors of a checkpoint to those of a model by ordinary torch functions (for example, from one
tensor per expert to one tensor for all experts). Called on a ``LazyTensor``, these functions read nothing: the result
records where each of its elements is stored, so that a rank can read only its own part.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lomo_ds.models.sources import Cast, Computed, Concatenated, Narrowed, Permuted, Reshaped, Source

aten = torch.ops.aten


class LazyTensor(Tensor):
    """A tensor that looks like one in host memory to torch functions, and whose values come from ``source``."""

    source: Source

    @staticmethod
    def __new__(cls: type["LazyTensor"], source: Source) -> "LazyTensor":
        """Wrap ``source``."""
        tensor: LazyTensor = Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=source.dtype, device=torch.device("cpu")
        )
        tensor.source = source
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Trace ``func``; if it does more than move values, it is computed when its result is read.

        Raises:
            NotImplementedError: ``func`` writes to a tensor.
        """
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} writes to a tensor that has not been read yet")

        def compute() -> Any:
            values, named = tree_map_only(LazyTensor, lambda lazy: lazy.source.read_whole(), (args, kwargs))
            return func(*values, **named)

        try:
            values, named = tree_map_only(LazyTensor, _like, (args, kwargs))
            like = func(*values, **named | ({"device": "meta"} if "device" in named else {}))
        except (NotImplementedError, RuntimeError):  # the result depends on values, as for torch.equal
            return compute()
        operation = _OPERATIONS.get(func.overloadpacket)
        result = None if operation is None else operation(like, *args, **kwargs)
        if isinstance(result, list):
            return [cls(source) for source in result]
        if not isinstance(like, Tensor):
            return compute()
        lazy = [value for value in tree_leaves((args, kwargs)) if isinstance(value, LazyTensor)]
        return cls(result or Computed(like.shape, like.dtype, tuple(value.source for value in lazy), compute))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


# Each of the functions below takes the result as a tensor (or tensors) on the meta device, and the arguments of the
# traced function. It returns None if the traced function does more than move values.


def _same(like: Tensor, tensor: LazyTensor, *_: Any, **__: Any) -> Source:
    return tensor.source if like.dtype == tensor.dtype else Cast(like.shape, like.dtype, tensor.source)


def _slice(
    like: Tensor, tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Source | None:
    first = slice(start, end).indices(tensor.shape[dim])[0]
    return Narrowed(like.shape, like.dtype, tensor.source, dim % tensor.dim(), first) if step == 1 else None


def _select(like: Tensor, tensor: LazyTensor, dim: int, index: int) -> Source:
    index %= tensor.shape[dim]
    row = _like(tensor).narrow(dim, index, 1)
    return Reshaped(like.shape, like.dtype, Narrowed(row.shape, row.dtype, tensor.source, dim % tensor.dim(), index))


def _split(like: Sequence[Tensor], tensor: LazyTensor, sizes: int | Sequence[int], dim: int = 0) -> list[Source]:
    starts = accumulate((part.shape[dim] for part in like), initial=0)
    return [
        Narrowed(part.shape, part.dtype, tensor.source, dim % tensor.dim(), start)
        for part, start in zip(like, starts, strict=False)
    ]


def _unbind(like: Sequence[Tensor], tensor: LazyTensor, dim: int = 0) -> list[Source]:
    return [_select(part, tensor, dim, index) for index, part in enumerate(like)]


def _cat(like: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Source | None:
    sources = tuple(
        tensor.source for tensor in tensors if isinstance(tensor, LazyTensor) and tensor.dim() == like.dim()
    )
    return Concatenated(like.shape, like.dtype, sources, dim % like.dim()) if len(sources) == len(tensors) else None


def _stack(like: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Source | None:
    return _cat(like, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _permute(like: Tensor, tensor: LazyTensor, dims: Sequence[int]) -> Source:
    return Permuted(like.shape, like.dtype, tensor.source, tuple(dim % tensor.dim() for dim in dims))


def _transpose(like: Tensor, tensor: LazyTensor, dim0: int, dim1: int) -> Source:
    dims = list(range(tensor.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(like, tensor, dims)


def _t(like: Tensor, tensor: LazyTensor) -> Source:
    return _permute(like, tensor, range(tensor.dim())[::-1])


def _reshape(like: Tensor, tensor: LazyTensor, *_: Any) -> Source:
    return Reshaped(like.shape, like.dtype, tensor.source)


_OPERATIONS: dict[Any, Callable[..., Source | list[Source] | None]] = {
    aten.detach: _same,
    aten.alias: _same,
    aten.clone: _same,
    aten._to_copy: _same,
    aten.slice: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.view: _reshape,
    aten._unsafe_view: _reshape,
    aten._reshape_alias: _reshape,
    aten.unsqueeze: _reshape,
    aten.squeeze: _reshape,
}
