"""Offloading of checkpointed layers' inputs to pinned host memory between forward and backward."""

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

MIN_BYTES = 2**16  # smaller tensors stay on the device, because starting a copy takes longer than the copy itself


class _Packed:
    """The object that autograd saves in place of a tensor; its buffer is released when autograd drops it.

    Attributes:
        buffer: host memory (uint8) whose first bytes hold the tensor.
        previous: the tensor that was packed before it, which backward needs after it.
        fetch: a prefetch in progress, started when the next tensor was unpacked.
    """

    def __init__(
        self, tensor: Tensor, buffer: Tensor, previous: "_Packed | None", released: deque[tuple[Tensor, Fetch | None]]
    ) -> None:
        self.buffer = buffer
        strides = torch.empty_like(tensor, device="meta").stride()  # keeps a transposed layout, for bit-equal results
        self.host_tensor = buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
        self.previous = None if previous is None else weakref.ref(previous)
        self.released = released
        self.fetch_started = False  # stays True after the fetch has finished
        self.fetch: Fetch | None = None

    def __del__(self) -> None:
        self.released.append((self.buffer, self.fetch))


class ActivationOffload:
    """Offload of layer inputs: copies to host memory overlap forward, and backward prefetches one layer ahead.

    All buffers are as large as the largest tensor so far and are reused from step to step. A layer must not write to
    its input in place, because that would break its recomputation (also without offload).

    Args:
        inputs: number of inputs that are kept at once, which determines how much host memory is pinned at once.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.buffers = 0  # of ``buffer_bytes``, pinned so far
        self.transfer: HostTransfer | None = None  # created for the device of the first tensor
        self.free: list[Tensor] = []
        self.buffer_bytes = 0
        self.pinned: PinnedMemory | None = None  # for the buffers that come next
        self.released: deque[tuple[Tensor, Fetch | None]] = deque()  # filled by the thread that frees the graph
        self.newest: weakref.ref[_Packed] | None = None

    def expect(self, inputs: int, nbytes: int) -> None:
        """Prepare for so many inputs at once, the largest of which has ``nbytes``."""
        if inputs > self.inputs or nbytes > self.buffer_bytes:
            self.inputs = max(inputs, self.inputs)
            self.pinned = None
        if nbytes > self.buffer_bytes:
            self.free.clear()
            self.buffer_bytes, self.buffers = nbytes, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationOffload":
        """Return this offload, which copies of a model share."""
        return self

    def __call__(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Run a layer as a checkpoint whose inputs are offloaded; its activations are recomputed in backward."""
        if any(isinstance(value, Parameter) for value in inputs):  # parameters stay on the device anyway
            return checkpoint(layer, *inputs, use_reentrant=False)
        with saved_tensors_hooks(self.pack, self.unpack):
            return checkpoint(layer, *inputs, use_reentrant=False)

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        """Start to move a tensor to host memory, unless it is small; return what ``unpack`` takes."""
        if not tensor.is_floating_point() or tensor.nbytes < MIN_BYTES:
            return tensor
        if self.transfer is None:
            self.transfer = HostTransfer(tensor.device)
        self._reclaim_buffers(self.transfer)
        previous = None if self.newest is None else self.newest()
        packed = _Packed(tensor, self._buffer(tensor.nbytes, tensor.device), previous, self.released)
        self.newest = weakref.ref(packed)
        self.transfer.offload(tensor.detach(), packed.host_tensor)
        return packed

    def unpack(self, packed: Tensor | _Packed) -> Tensor:
        """Return the tensor on its device again, and start to fetch the one that was packed before it."""
        if isinstance(packed, Tensor):
            return packed
        assert self.transfer is not None
        self.transfer.flush()  # backward has begun, so the sources of forward's copies can be freed
        fetch = packed.fetch or self._start_fetch(packed)
        packed.fetch = None
        previous = None if packed.previous is None else packed.previous()
        if previous is not None and not previous.fetch_started:
            previous.fetch = self._start_fetch(previous)
        return self.transfer.finish_fetch(fetch)

    def _start_fetch(self, packed: _Packed) -> Fetch:
        assert self.transfer is not None
        packed.fetch_started = True
        return self.transfer.start_fetch(packed.host_tensor)

    def _reclaim_buffers(self, transfer: HostTransfer) -> None:
        """Reclaim the buffers of packed tensors that autograd has released, whether unpacked or not."""
        while self.released:
            buffer, fetch = self.released.popleft()
            if fetch is not None:  # the copy must finish before its memory is freed
                transfer.finish_fetch(fetch)
            if buffer.nbytes == self.buffer_bytes:
                self.free.append(buffer)

    def _buffer(self, nbytes: int, device: torch.device) -> Tensor:
        self.expect(self.inputs, nbytes)
        if self.pinned is None:
            self.pinned = PinnedMemory(device, (self.inputs - self.buffers) * self.buffer_bytes)
        if not self.free:
            self.buffers += 1
            self.free.append(self.pinned.empty_like(torch.empty(self.buffer_bytes, dtype=torch.uint8, device="meta")))
        return self.free.pop()
