"""Inputs of checkpointed layers in pinned host memory, from their forward until their backward wants them."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from lomo_ds.memory.host_memory import Fetch, HostTransfer, PinnedMemory

SMALLEST_BYTES = 2**16  # what is smaller stays on the device: a copy takes longer to begin than to do


class _Packed:
    """What autograd keeps in a tensor's place; its buffer is free again when autograd drops it.

    Attributes:
        buffer: of bytes; the tensor's come first.
        previous: what was packed before it, which backward wants after it.
        fetch: under way, begun by what was packed after it.
    """

    def __init__(
        self, tensor: Tensor, buffer: Tensor, previous: "_Packed | None", dropped: deque[tuple[Tensor, Fetch | None]]
    ) -> None:
        self.buffer = buffer
        strides = torch.empty_like(tensor, device="meta").stride()  # a transposed tensor stays one, for the same bits
        self.host_tensor = buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
        self.previous = None if previous is None else weakref.ref(previous)
        self.dropped = dropped
        self.wanted = False  # whether a fetch of it has begun, ever
        self.fetch: Fetch | None = None

    def __del__(self) -> None:
        self.dropped.append((self.buffer, self.fetch))


class ActivationOffload:
    """Copies layer inputs to host memory behind forward, and back one ahead of backward.

    Buffers are all as large as the largest tensor so far, and are used again from step to step. A layer must not
    write to its input in place, which would spoil its recomputation without offload too.

    Args:
        layers: how many there are, for which host memory is pinned in few pieces.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.transfer: HostTransfer | None = None  # made for the device of the first tensor
        self.free: list[Tensor] = []
        self.buffer_bytes = 0
        self.dropped: deque[tuple[Tensor, Fetch | None]] = deque()  # by whatever thread lets a graph go
        self.newest: weakref.ref[_Packed] | None = None

    def checkpoint(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Run a layer whose inputs leave the device; what it saves inside is dropped and computed again."""
        if any(isinstance(value, Parameter) for value in inputs):  # it is there anyway
            return checkpoint(layer, *inputs, use_reentrant=False)
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(layer, *inputs, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Tensor | _Packed:
        if not tensor.is_floating_point() or tensor.nbytes < SMALLEST_BYTES:
            return tensor
        if self.transfer is None:
            self.transfer = HostTransfer(tensor.device)
        self._collect(self.transfer)
        previous = None if self.newest is None else self.newest()
        packed = _Packed(tensor, self._buffer(tensor.nbytes, tensor.device), previous, self.dropped)
        self.newest = weakref.ref(packed)
        self.transfer.offload(tensor.detach(), packed.host_tensor)
        return packed

    def _unpack(self, packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert self.transfer is not None
        self.transfer.flush()  # backward has begun: forward's copies need not be held any more
        fetch = packed.fetch or self._start(packed)
        packed.fetch = None
        previous = None if packed.previous is None else packed.previous()
        if previous is not None and not previous.wanted:
            previous.fetch = self._start(previous)
        return self.transfer.finish_fetch(fetch)

    def _start(self, packed: _Packed) -> Fetch:
        assert self.transfer is not None
        packed.wanted = True
        return self.transfer.start_fetch(packed.host_tensor)

    def _collect(self, transfer: HostTransfer) -> None:
        """Take back the buffers of what autograd has dropped, used or not."""
        while self.dropped:
            buffer, fetch = self.dropped.popleft()
            if fetch is not None:  # its copy must finish before its memory is freed
                transfer.finish_fetch(fetch)
            if buffer.nbytes == self.buffer_bytes:
                self.free.append(buffer)

    def _buffer(self, nbytes: int, device: torch.device) -> Tensor:
        if nbytes > self.buffer_bytes:
            self.free.clear()
            self.buffer_bytes = nbytes
            self.pinned = PinnedMemory(device, self.layers * nbytes)
        if not self.free:
            self.free.append(self.pinned.empty_like(torch.empty(self.buffer_bytes, dtype=torch.uint8, device="meta")))
        return self.free.pop()
