"""Tensors of a GPU kept in pinned host memory, copied there and back on streams of their own."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

SLAB_BYTES = 2**28  # pinned at once: torch pins a power of two, which for each tensor by itself could be twice as much
IN_FLIGHT_BYTES = 128 * 2**20  # device memory that copies under way may hold, in either direction


class HostMemory:
    """Pinned buffers, each allocated once, when its tensor first comes.

    No call waits on the host. A copy's device tensor is held until the computing stream has been told to wait for the
    copy, so what is allocated later may use its memory again, and no more than ``IN_FLIGHT_BYTES``, or one tensor,
    is held so.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down = torch.cuda.Stream(device)
        self.up = torch.cuda.Stream(device)
        self.buffers: dict[int, Tensor] = {}
        self.slab = torch.empty(0, dtype=torch.uint8)  # what is left of the newest one
        self.leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self.leaving_bytes = 0

    def put(self, index: int, tensor: Tensor) -> None:
        """Begin to copy ``tensor`` into the buffer ``index``; the caller must not write to it any more."""
        buffer = self.buffers.get(index)
        if buffer is None or buffer.dtype != tensor.dtype:
            buffer = self.buffers[index] = self._cut(tensor)
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        self.down.wait_stream(self.up)  # which may read the buffer still, if what asked for it has failed
        with torch.cuda.stream(self.down):
            buffer.copy_(tensor, non_blocking=True)
            self.leaving.append((self.down.record_event(), tensor))
        self.leaving_bytes += tensor.nbytes
        self._let_go(IN_FLIGHT_BYTES)

    def flush(self) -> None:
        """Let go of every tensor that was put."""
        self._let_go(0)

    def get(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        """The tensors put last under ``indices``, on the device, some of them copied ahead."""
        self.up.wait_stream(self.down)
        coming: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        coming_bytes = 0
        try:
            for index in indices:
                tensor, arrived = self._fetch(index)
                coming.append((index, tensor, arrived))
                coming_bytes += tensor.nbytes
                del tensor
                while coming_bytes > IN_FLIGHT_BYTES:
                    coming_bytes -= coming[0][1].nbytes
                    yield self._receive(*coming.popleft())
            while coming:
                yield self._receive(*coming.popleft())
        finally:  # what nobody came for is freed no sooner than it is written
            torch.cuda.current_stream(self.device).wait_stream(self.up)

    def _fetch(self, index: int) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy the buffer to the device, into memory that is the computing stream's to free."""
        tensor = torch.empty_like(self.buffers[index], device=self.device, pin_memory=False)
        self.up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.up):
            tensor.copy_(self.buffers[index], non_blocking=True)
            return tensor, self.up.record_event()

    def _receive(self, index: int, tensor: Tensor, arrived: torch.cuda.Event) -> tuple[int, Tensor]:
        torch.cuda.current_stream(self.device).wait_event(arrived)
        return index, tensor

    def _cut(self, tensor: Tensor) -> Tensor:
        """Pinned memory for as much as ``tensor``."""
        taken = -(-tensor.nbytes // 64) * 64
        if len(self.slab) < taken:
            self.slab = torch.empty(max(SLAB_BYTES, taken), dtype=torch.uint8, pin_memory=True)
        piece, self.slab = self.slab[: tensor.nbytes], self.slab[taken:]
        return piece.view(tensor.dtype).view(tensor.shape)

    def _let_go(self, until: int) -> None:
        while self.leaving and self.leaving_bytes > until:
            copied, tensor = self.leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(copied)
            self.leaving_bytes -= tensor.nbytes
