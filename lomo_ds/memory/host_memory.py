"""Pinned host memory of a GPU, and copies between the two on streams of their own.

On the CPU, where both are the same memory, nothing is pinned and every copy is made at once.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# torch pins powers of two: a tensor by itself could take twice its size, many in one slab take little more than theirs
LARGEST_SLAB = 2**31
SMALLEST_SLAB = 2**20
ALIGNMENT = 64
IN_FLIGHT_BYTES = 128 * 2**20  # device memory that copies under way may hold, in either direction


class Slabs:
    """Places tensors in slabs of powers of two; of memory it knows nothing.

    Args:
        total: bytes of all tensors to come, as far as that is known; of a last slab little stays empty then.

    Attributes:
        sizes: bytes of the slabs so far.
    """

    def __init__(self, total: int) -> None:
        self.expected = total
        self.sizes: list[int] = []
        self.taken: list[int] = []

    def place(self, nbytes: int) -> tuple[int, int]:
        """The slab for so many bytes, and where in it they begin; the first one with room, or a new one."""
        needed = -(-nbytes // ALIGNMENT) * ALIGNMENT
        slab = next((n for n, size in enumerate(self.sizes) if self.taken[n] + needed <= size), len(self.sizes))
        if slab == len(self.sizes):
            fitting = max(needed, SMALLEST_SLAB)
            wanted = max(min(self.expected, LARGEST_SLAB), fitting)
            size = 1 << (wanted.bit_length() - 1)  # what is left over goes into smaller ones
            self.sizes.append(size if size >= fitting else 2 * size)
            self.taken.append(0)
        self.expected -= needed
        start = self.taken[slab]
        self.taken[slab] += needed
        return slab, start


class PinnedMemory:
    """Cuts tensors from slabs of pinned memory; what is cut is never given back.

    Args:
        device: the one whose copies it is for; on the CPU memory is ordinary.
        total: see ``Slabs``.
    """

    def __init__(self, device: torch.device, total: int) -> None:
        self.pinned = device.type != "cpu"
        self.slabs = Slabs(total)
        self.memory: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a 1-D tensor as ``tensor``, its contents anything."""
        slab, start = self.slabs.place(tensor.nbytes)
        if slab == len(self.memory):
            self.memory.append(torch.empty(self.slabs.sizes[slab], dtype=torch.uint8, pin_memory=self.pinned))
        return self.memory[slab][start : start + tensor.nbytes].view(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Fetch:
    """A copy on its way up; ``tensor`` may be used, or freed, once the computing stream waits for it."""

    tensor: Tensor
    arrived: torch.Event | None  # None on the CPU, where nothing is ever under way


@dataclass(frozen=True, eq=False)
class _Offload:
    """A copy on its way down."""

    tensor: Tensor
    host_tensor: Tensor
    copied: torch.Event | None


class HostTransfer:
    """Copies between a device and its pinned memory, both ways at once and beside what is computed.

    No call waits on the host. The computing stream is told to wait for a copy up when its tensor is taken, and for a
    copy down when its tensor is let go of, to bound the bytes in flight or in ``flush``. Until then device tensors are
    held, so that no memory is used again that a copy still reads or writes. Held so, in either direction, are at most
    ``IN_FLIGHT_BYTES``, or one tensor that is larger.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = torch.get_device_module(device)
        self.downward = self.streams.Stream(device)
        self.upward = self.streams.Stream(device)
        self.offloads: deque[_Offload] = deque()
        self.offload_bytes = 0

    def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
        """Begin to copy ``tensor`` into ``host_tensor``; the caller must not write to ``tensor`` any more.

        What bounds the bytes in flight is a wait for earlier copies, never for the one that begins here.
        """
        self.downward.wait_stream(self._computing)
        with self.streams.stream(self.downward):
            host_tensor.copy_(tensor, non_blocking=True)
            self.offloads.append(_Offload(tensor, host_tensor, self.downward.record_event()))
        self.offload_bytes += tensor.nbytes
        while len(self.offloads) > 1 and self.offload_bytes > IN_FLIGHT_BYTES:
            self._release_oldest()

    def fetch(self, host_tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """What lies in ``host_tensors``, on the device; the next ones are on their way while one is used."""
        coming: deque[Fetch] = deque()
        coming_bytes = 0
        try:
            for host_tensor in host_tensors:
                coming.append(self.start_fetch(host_tensor))
                coming_bytes += host_tensor.nbytes
                while len(coming) > 1 and coming_bytes > IN_FLIGHT_BYTES:
                    coming_bytes -= coming[0].tensor.nbytes
                    yield self.finish_fetch(coming.popleft())
            while coming:
                yield self.finish_fetch(coming.popleft())
        finally:
            for unclaimed in coming:  # its copy must finish before its memory is freed
                self.finish_fetch(unclaimed)

    def start_fetch(self, host_tensor: Tensor) -> Fetch:
        """Begin to copy ``host_tensor`` to the device, behind an offload into the same memory that is under way."""
        tensor = torch.empty_like(host_tensor, device=self.device, pin_memory=False)  # in the computing stream's pool
        self.upward.wait_stream(self._computing)
        copied = self._offload_under_way(host_tensor)
        if copied is not None:
            self.upward.wait_event(copied)
        with self.streams.stream(self.upward):
            tensor.copy_(host_tensor, non_blocking=True)
            return Fetch(tensor, self.upward.record_event())

    def finish_fetch(self, fetch: Fetch) -> Tensor:
        """Let the computing stream wait for a fetch, whose tensor can then be used or freed."""
        if fetch.arrived is not None:
            self._computing.wait_event(fetch.arrived)
        return fetch.tensor

    def flush(self) -> None:
        """Let go of every tensor on its way down; whatever comes later finds the host memory written."""
        while self.offloads:
            self._release_oldest()

    @property
    def _computing(self) -> torch.Stream:
        return self.streams.current_stream(self.device)

    def _offload_under_way(self, host_tensor: Tensor) -> torch.Event | None:
        """The last copy down into that memory, or a part of it; None if the computing stream waits for it already."""
        start, stop = _span(host_tensor)
        for offload in reversed(self.offloads):
            first, last = _span(offload.host_tensor)
            if first < stop and start < last:
                return offload.copied
        return None

    def _release_oldest(self) -> None:
        offload = self.offloads.popleft()
        if offload.copied is not None:
            self._computing.wait_event(offload.copied)
        self.offload_bytes -= offload.tensor.nbytes


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a contiguous tensor: its first byte, and the one behind its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that ``tensors`` keep alive, each slab counted once, whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
