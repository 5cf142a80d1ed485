"""Counts what a tensor operation asks of a GPU: floating-point operations, and bytes of its memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lomo_ds.simulate.program import Work

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten.alias,
    aten.lift_fresh,
    aten.set_,
    aten._unsafe_view,
}
LOOKUPS = {aten.embedding, aten.index_select, aten.gather}  # which read no more than they write


def is_free(func: Any) -> bool:
    """Return whether an operation launches no kernel: it makes a view, or allocates memory."""
    return func.is_view or func._overloadpacket in ALLOCATIONS


def flops_of(packet: Any, args: Any) -> int:
    """Return the floating-point operations of a matrix product; 0 for other operations."""
    if packet is aten.mm:
        return 2 * args[0].numel() * int(args[1].shape[1])
    if packet is aten.bmm:
        return 2 * args[0].numel() * int(args[1].shape[2])
    if packet is aten.addmm:
        return 2 * args[1].numel() * int(args[2].shape[1])
    return 0


def memory_bytes(packet: Any, tensors: Sequence[Tensor]) -> int:
    """Return the bytes that the kernel of an operation reads and writes.

    Args:
        tensors: its inputs and its results, which come last; a tensor that is changed in place is both.
    """
    if packet in LOOKUPS:
        return 2 * tensors[-1].nbytes
    return sum(map(touched_bytes, tensors))


def touched_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; elements that it repeats count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def kernel_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any, device: str) -> Work | None:
    """Return the work of the kernel that an operation launches on a device; None if it launches none there."""
    packet = func._overloadpacket
    if is_free(func):
        return None
    inputs = (args, {name: value for name, value in kwargs.items() if name != "out"})
    tensors = [leaf for leaf in tree_leaves((inputs, result)) if isinstance(leaf, Tensor)]
    if not any(tensor.device.type == device for tensor in tensors):
        return None
    if packet in COPIES:
        return copy_work(args[1] if packet is aten.copy_ else args[0], result)
    return Work(flops=flops_of(packet, args), memory=memory_bytes(packet, tensors))


def copy_work(source: Tensor, result: Tensor) -> Work:
    """Return the work of a copy within a device."""
    return Work(memory=touched_bytes(source) + touched_bytes(result))
