"""Pinned host memory of a GPU, and copies between the two on streams of their own.

On the CPU, where both are the same memory, nothing is pinned and every copy is made at once.
"""

from collections import deque
from collections.abc import Iterable, Iterator

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


class Ferry:
    """Copies between a device and its pinned memory, both ways at once and beside what is computed.

    No call waits on the host. A copy's device tensor is held until the computing stream has been told to wait for the
    copy, so what is allocated later may use its memory again, and no more than ``IN_FLIGHT_BYTES``, or one tensor,
    is held so in either direction.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = torch.get_device_module(device)
        self.downward = self.streams.Stream(device)
        self.upward = self.streams.Stream(device)
        self.leaving: deque[tuple[torch.Event | None, Tensor]] = deque()
        self.leaving_bytes = 0

    def down(self, tensor: Tensor, home: Tensor) -> None:
        """Begin to copy ``tensor`` into ``home``; the caller must not write to ``tensor`` any more."""
        self.downward.wait_stream(self._computing)
        with self.streams.stream(self.downward):
            home.copy_(tensor, non_blocking=True)
            self.leaving.append((self.downward.record_event(), tensor))
        self.leaving_bytes += tensor.nbytes
        self._let_go(IN_FLIGHT_BYTES)

    def up(self, homes: Iterable[Tensor]) -> Iterator[Tensor]:
        """What lies in ``homes``, on the device, some of them copied ahead of being asked for."""
        self.upward.wait_stream(self.downward)
        coming: deque[tuple[Tensor, torch.Event | None]] = deque()
        coming_bytes = 0
        try:
            for home in homes:
                coming.append(self._fetch(home))
                coming_bytes += home.nbytes
                while coming_bytes > IN_FLIGHT_BYTES:
                    coming_bytes -= coming[0][0].nbytes
                    yield self._receive(*coming.popleft())
            while coming:
                yield self._receive(*coming.popleft())
        finally:  # what nobody came for is freed no sooner than it is written
            self._computing.wait_stream(self.upward)

    def flush(self) -> None:
        """Let go of every tensor on its way down; what comes up from here on is what has gone down."""
        self._let_go(0)
        self.downward.wait_stream(self.upward)  # which may be reading still, if what asked for it has failed

    @property
    def _computing(self) -> torch.Stream:
        return self.streams.current_stream(self.device)

    def _fetch(self, home: Tensor) -> tuple[Tensor, torch.Event | None]:
        """Begin to copy ``home`` to the device, into memory that is the computing stream's to free."""
        tensor = torch.empty_like(home, device=self.device, pin_memory=False)
        self.upward.wait_stream(self._computing)
        with self.streams.stream(self.upward):
            tensor.copy_(home, non_blocking=True)
            return tensor, self.upward.record_event()

    def _receive(self, tensor: Tensor, arrived: torch.Event | None) -> Tensor:
        if arrived is not None:  # on the CPU nothing is under way
            self._computing.wait_event(arrived)
        return tensor

    def _let_go(self, until: int) -> None:
        while self.leaving and self.leaving_bytes > until:
            copied, tensor = self.leaving.popleft()
            if copied is not None:
                self._computing.wait_event(copied)
            self.leaving_bytes -= tensor.nbytes


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory that ``tensors`` keep alive, each slab counted once, whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
