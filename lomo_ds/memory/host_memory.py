"""Pinned host memory, and asynchronous copies between host and device on separate streams.

On the CPU nothing is pinned and every copy is synchronous.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

# torch pins powers of two: a single tensor could take twice its size; tensors that share a slab waste little
LARGEST_SLAB = 2**34
SMALLEST_SLAB = 2**20
ALIGNMENT = 64
IN_FLIGHT_BYTES = 128 * 2**20  # limit on device memory held by pending copies, in each direction


class Slabs:
    """Layout of tensors in slabs whose sizes are powers of two; it allocates no memory itself.

    Args:
        total: expected bytes of all tensors, which keeps the unused end of the last slab small.

    Attributes:
        sizes: bytes of each slab so far.
    """

    def __init__(self, total: int) -> None:
        self.expected = total
        self.sizes: list[int] = []
        self.taken: list[int] = []

    def place(self, nbytes: int) -> tuple[int, int]:
        """Return the number of the first slab with room for ``nbytes``, or of a new one, and the offset in it."""
        needed = ceil_div(nbytes, ALIGNMENT) * ALIGNMENT
        slab = next((n for n, size in enumerate(self.sizes) if self.taken[n] + needed <= size), len(self.sizes))
        if slab == len(self.sizes):
            smallest = max(needed, SMALLEST_SLAB)
            target = max(min(self.expected, LARGEST_SLAB), smallest)
            size = 1 << (target.bit_length() - 1)  # the remainder goes into smaller slabs
            self.sizes.append(size if size >= smallest else 2 * size)
            self.taken.append(0)
        self.expected -= needed
        start = self.taken[slab]
        self.taken[slab] += needed
        return slab, start


class PinnedMemory:
    """Allocator of tensors in slabs of pinned memory, which are never freed one by one.

    Args:
        device: the device that copies to and from this memory; for the CPU, memory is not pinned.
        total: see ``Slabs``.
    """

    def __init__(self, device: torch.device, total: int) -> None:
        self.pinned = device.type != "cpu"
        self.slabs = Slabs(total)
        self.memory: list[Tensor] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor with the shape and dtype of ``tensor``, which is 1-D."""
        slab, start = self.slabs.place(tensor.nbytes)
        if slab == len(self.memory):
            self.memory.append(torch.empty(self.slabs.sizes[slab], dtype=torch.uint8, pin_memory=self.pinned))
        return self.memory[slab][start : start + tensor.nbytes].view(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Fetch:
    """Pending copy to the device; ``tensor`` may be used or freed once the compute stream waits for it."""

    tensor: Tensor
    arrived: torch.Event | None  # None on the CPU, where copies are synchronous


@dataclass(frozen=True, eq=False)
class _Offload:
    """Pending copy to host memory."""

    tensor: Tensor
    host_tensor: Tensor
    copied: torch.Event | None


class HostTransfer:
    """Asynchronous copies between a device and pinned host memory, in both directions, that overlap with computation.

    No call blocks the host. The compute stream waits for a fetch when its tensor is taken, and for an offload when its
    device tensor is released: in ``flush``, or to bound the bytes in flight. Until then device tensors are kept alive,
    so that their memory is not reused while a copy reads or writes it. Each direction keeps at most
    ``IN_FLIGHT_BYTES`` alive, or one larger tensor.

    Args:
        max_offload_bytes: another limit for offloads.
    """

    def __init__(self, device: torch.device, max_offload_bytes: int | None = None) -> None:
        self.device = device
        self.max_offload_bytes = IN_FLIGHT_BYTES if max_offload_bytes is None else max_offload_bytes
        self.streams = torch.get_device_module(device)
        self.offload_stream = self.streams.Stream(device)
        self.fetch_stream = self.streams.Stream(device)
        self.offloads: deque[_Offload] = deque()
        self.offload_bytes = 0

    def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
        """Start to copy ``tensor`` into ``host_tensor``; the caller must not write to ``tensor`` afterwards.

        To bound the bytes in flight, the compute stream waits for earlier copies, never for this one.
        """
        self.offload_stream.wait_stream(self._compute_stream)
        with self.streams.stream(self.offload_stream):
            host_tensor.copy_(tensor, non_blocking=True)
            self.offloads.append(_Offload(tensor, host_tensor, self.offload_stream.record_event()))
        self.offload_bytes += tensor.nbytes
        while len(self.offloads) > 1 and self.offload_bytes > self.max_offload_bytes:
            self._release_oldest()

    def fetch(self, host_tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield a device copy of each host tensor; the next copies are in flight while one is used."""
        pending: deque[Fetch] = deque()
        pending_bytes = 0
        try:
            for host_tensor in host_tensors:
                pending.append(self.start_fetch(host_tensor))
                pending_bytes += host_tensor.nbytes
                while len(pending) > 1 and pending_bytes > IN_FLIGHT_BYTES:
                    pending_bytes -= pending[0].tensor.nbytes
                    yield self.finish_fetch(pending.popleft())
            while pending:
                yield self.finish_fetch(pending.popleft())
        finally:
            for unclaimed in pending:  # the copy must finish before its memory is freed
                self.finish_fetch(unclaimed)

    def start_fetch(self, host_tensor: Tensor) -> Fetch:
        """Start to copy ``host_tensor`` to the device, after any pending offload into the same memory."""
        # allocated here, so that it belongs to the memory pool of the compute stream
        tensor = torch.empty_like(host_tensor, device=self.device, pin_memory=False)
        self.fetch_stream.wait_stream(self._compute_stream)
        copied = self._pending_offload(host_tensor)
        if copied is not None:
            self.fetch_stream.wait_event(copied)
        with self.streams.stream(self.fetch_stream):
            tensor.copy_(host_tensor, non_blocking=True)
            return Fetch(tensor, self.fetch_stream.record_event())

    def finish_fetch(self, fetch: Fetch) -> Tensor:
        """Make the compute stream wait for a fetch, and return its tensor, which may then be used or freed."""
        if fetch.arrived is not None:
            self._compute_stream.wait_event(fetch.arrived)
        return fetch.tensor

    def flush(self) -> None:
        """Release the device tensors of all offloads; later work in the compute stream finds host memory written."""
        while self.offloads:
            self._release_oldest()

    @property
    def _compute_stream(self) -> torch.Stream:
        return self.streams.current_stream(self.device)

    def _pending_offload(self, host_tensor: Tensor) -> torch.Event | None:
        """Return the event of the last pending offload into the memory of ``host_tensor``; None if there is none."""
        overlapping = (offload for offload in reversed(self.offloads) if _overlap(offload.host_tensor, host_tensor))
        offload = next(overlapping, None)
        return None if offload is None else offload.copied

    def _release_oldest(self) -> None:
        offload = self.offloads.popleft()
        if offload.copied is not None:
            self._compute_stream.wait_event(offload.copied)
        self.offload_bytes -= offload.tensor.nbytes


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two contiguous tensors have memory in common."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    starts = [tensor.storage_offset() * tensor.itemsize for tensor in (one, other)]
    return max(starts) < min(starts[0] + one.nbytes, starts[1] + other.nbytes)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages that ``tensors`` keep alive, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
