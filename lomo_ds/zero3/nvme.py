"""Swap file for shards on NVMe, read and written with O_DIRECT by a thread pool.

DeepSpeed's own swapper keeps one buffer for every gathered parameter, each as large as the largest shard. Here shards
pass through a few buffers, in pieces if they are larger, which bounds the host memory. DeepSpeed's async_io (libaio) is
not used either: it takes minutes to compile on each machine, and a drive error ends the process.
"""

import os
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError, OffloadError
from lomo_ds.zero3.nvme_settings import PAGE_BYTES, NvmeSettings, nameless_file

Group = tuple["SwapSlot", ...]  # slots that are read for one gather


class SwapSpace:
    """Swap file of one model on one rank, and the I/O buffers.

    The file is unnamed: it is deleted with the model, or with the process, however that ends. Any number of jobs and
    ranks may share an ``nvme_path``. The threads end with the model too: nothing is waited for then, since the garbage
    collector may free it in a thread that holds locks.

    Args:
        device: the compute device.
    """

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.file = _SwapFile(nameless_file(settings.path))
        self.requests = ThreadPoolExecutor(settings.requests_at_once, "lomo_ds-nvme")
        self.end = 0  # bytes of the file
        self.vacant: dict[int, list[int]] = defaultdict(list)  # offsets of free slots, by size
        self.buffers: list[_IoBuffer] = []
        self.free: deque[_IoBuffer] = deque()
        self.writing: deque[tuple[SwapSlot, _IoBuffer]] = deque()
        self.ahead: dict[SwapSlot, _IoBuffer] = {}  # buffers that prefetch the first piece of a slot
        self.expected: list[SwapSlot] = []  # slots that will be read next, in order
        self.last: tuple[Group, Group] = ((), ())  # the last two groups that were gathered
        self.successors: dict[tuple[Group, Group], Group] = {}
        self.lock = threading.RLock()  # a checkpoint may be written by another thread, which reads slots

    def accepts(self, nbytes: int) -> bool:
        """Return whether a shard is large enough to be stored here."""
        return nbytes >= self.settings.block_size

    def allocate_slot(self, numel: int, dtype: torch.dtype) -> "SwapSlot":
        """Allocate a slot for ``numel`` elements, with its space on the drive.

        Raises:
            ConfigError: the drive is full.
        """
        nbytes = self.settings.aligned(numel * dtype.itemsize)
        if self.vacant[nbytes]:
            return SwapSlot(self, self.vacant[nbytes].pop(), numel, dtype)
        try:
            os.posix_fallocate(self.file.descriptor, self.end, nbytes)
        except OSError as error:
            raise ConfigError(
                f"offload_param.nvme_path {self.settings.path} cannot hold a shard of {nbytes / 2**20:.1f} MiB beside "
                f"{self.end / 2**20:.1f} MiB: {error.strerror}; make room, or use more ranks or another path"
            ) from None
        self.end += nbytes
        return SwapSlot(self, self.end - nbytes, numel, dtype)

    def expect(self, slots: Sequence["SwapSlot"]) -> None:
        """Announce that ``slots`` are read next, and predict that the group which followed last time comes after them.

        The prediction depends on the last two groups, which distinguishes forward from backward.
        """
        with self.lock:
            group = tuple(slots)
            self.successors[self.last] = group
            self.last = (self.last[1], group)
            self.expected = [*group, *self.successors.get(self.last, ())]

    def read(self, slot: "SwapSlot", into: Tensor) -> None:
        """Fill ``into`` (1-D, on any device) with the first bytes of ``slot``."""
        flat = into.view(torch.uint8)
        if not flat.numel():
            return
        with self.lock:
            self._finish_writes(slot)
            next_buffer = self.ahead.pop(slot, None)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                buffer = next_buffer or self._start_read(slot, start)
                buffer.finish()
                stop = start + self.settings.piece_bytes
                next_buffer = self._start_read(slot, stop) if stop < flat.numel() else None
                buffer.copy_out(flat[start:stop])
                self.free.append(buffer)
            if self.expected and self.expected[0] is slot:
                self.expected.pop(0)
                self._read_ahead()

    def write(self, slot: "SwapSlot", values: Tensor) -> None:
        """Start to write ``values`` to the beginning of ``slot``; the caller must not change them afterwards.

        Args:
            values: 1-D, on any device.
        """
        flat = values.detach().view(torch.uint8)
        with self.lock:
            self._finish_writes(slot)
            if slot in self.ahead:
                self._cancel_read(slot)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                piece = flat[start : start + self.settings.piece_bytes]
                buffer = self._acquire()
                buffer.copy_in(piece, slot.start + start)
                self.writing.append((slot, buffer))
            for _, buffer in self.writing:
                buffer.start_write()

    def finish(self) -> None:
        """Wait until all writes are finished."""
        with self.lock:
            while self.writing:
                self._finish_oldest_write()

    def _start_read(self, slot: "SwapSlot", start: int) -> "_IoBuffer":
        buffer = self._acquire()
        buffer.start_read(slot.start + start, min(slot.nbytes - start, self.settings.piece_bytes))
        return buffer

    def _acquire(self) -> "_IoBuffer":
        """Return an idle buffer: a new one, a free one, or one whose prefetch is dropped or whose write is awaited."""
        if not self.free and len(self.buffers) < self.settings.buffer_count:
            self.buffers.append(_IoBuffer(self.settings, self.device, self.file, self.requests))
            return self.buffers[-1]
        if not self.free and self.ahead:
            self._cancel_read(next(iter(self.ahead)))
        if not self.free:
            self._finish_oldest_write()
        return self.free.popleft()

    def _cancel_read(self, slot: "SwapSlot") -> None:
        buffer = self.ahead.pop(slot)
        buffer.finish()
        self.free.append(buffer)

    def _finish_writes(self, slot: "SwapSlot") -> None:
        while any(written is slot for written, _ in self.writing):
            self._finish_oldest_write()

    def _finish_oldest_write(self) -> None:
        _, buffer = self.writing.popleft()
        buffer.finish()
        self.free.append(buffer)

    def _read_ahead(self) -> None:
        """Prefetch the expected slots, as long as there are free buffers and no pending write to the slot."""
        upcoming = self.expected[: self.settings.buffer_count // 2]
        for slot in self.ahead.keys() - set(upcoming):
            self._cancel_read(slot)
        for slot in upcoming:
            if any(written is slot for written, _ in self.writing):
                return
            if slot not in self.ahead and (self.free or len(self.buffers) < self.settings.buffer_count):
                self.ahead[slot] = self._start_read(slot, 0)


class SwapSlot:
    """Region of the swap file that stores one shard; it is reused once the slot is no longer referenced.

    Args:
        start: offset in bytes.
        numel: elements of the shard with its padding.
    """

    def __init__(self, space: SwapSpace, start: int, numel: int, dtype: torch.dtype) -> None:
        self.space = space
        self.start = start
        self.numel = numel
        self.dtype = dtype
        self.nbytes = numel * dtype.itemsize
        vacant = space.vacant[space.settings.aligned(self.nbytes)]
        weakref.finalize(self, vacant.append, start).atexit = False

    def read(self, numel: int, device: torch.device | str = "cpu") -> Tensor:
        """Read the first ``numel`` elements into a new tensor on ``device``; see ``SwapSpace.read``."""
        tensor = torch.empty(numel, dtype=self.dtype, device=device)
        self.space.read(self, tensor)
        return tensor

    def write(self, values: Tensor) -> None:
        """Start to write ``values`` to the beginning of the slot; see ``SwapSpace.write``."""
        assert values.dtype == self.dtype
        self.space.write(self, values)

    def copy(self) -> "SwapSlot":
        """Return a new slot with the same contents."""
        duplicate = self.space.allocate_slot(self.numel, self.dtype)
        duplicate.write(self.read(self.numel))
        return duplicate


class _SwapFile:
    """Open file, closed when neither its ``SwapSpace`` nor a pending request refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


class _IoBuffer:
    """Host buffer for one read or write at a time."""

    def __init__(
        self, settings: NvmeSettings, device: torch.device, file: _SwapFile, requests: ThreadPoolExecutor
    ) -> None:
        self.settings = settings
        self.device = device
        self.file = file
        self.requests = requests
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.streams = torch.get_device_module(device)
        self.copy_stream = self.streams.Stream(device)
        self.copied: torch.Event | None = None  # event of the device's last use of the buffer
        self.source: Tensor | None = None  # tensor that is being copied into the buffer
        self.target: tuple[int, int] | None = None  # pending write: file offset and bytes
        self.futures: list[Future[None]] = []

    def start_read(self, start: int, nbytes: int) -> None:
        """Start to read into the buffer."""
        self._reserve(nbytes)
        self._submit(os.preadv, start, nbytes)

    def copy_out(self, into: Tensor) -> None:
        """Copy the contents to ``into`` in the current stream of the device."""
        into.copy_(self.memory[: into.numel()], non_blocking=True)
        if into.device.type != "cpu":
            self.copied = self.streams.current_stream(self.device).record_event()

    def copy_in(self, values: Tensor, start: int) -> None:
        """Start to copy ``values`` into the buffer, in a separate stream, to be written to the file at ``start``."""
        self._reserve(values.numel())
        self.copy_stream.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.copy_stream):
            self.memory[: values.numel()].copy_(values, non_blocking=True)
            if values.device.type != "cpu":
                self.copied = self.copy_stream.record_event()
        self.source, self.target = values, (start, values.numel())

    def start_write(self, wait: bool = False) -> None:
        """Start the write that ``copy_in`` prepared, if the copy has finished."""
        if self.target is not None and (wait or self.copied is None or self.copied.query()):
            self._wait_for_copy()
            (start, nbytes), self.target = self.target, None
            self._submit(os.pwritev, start, nbytes)

    def finish(self) -> None:
        """Wait for the pending read or write.

        Raises:
            OffloadError: the drive failed.
        """
        self.start_write(wait=True)
        futures, self.futures = self.futures, []
        wait(futures)  # all of them, since they use the buffer
        for future in futures:
            if error := future.exception():
                raise OffloadError(
                    f"a shard in offload_param.nvme_path {self.settings.path} cannot be read or written: {error}; look "
                    "at the drive, then resume from the last checkpoint"
                ) from error

    def _reserve(self, nbytes: int) -> None:
        """Wait until the buffer is unused, and enlarge it to at least ``nbytes``."""
        self._wait_for_copy()
        needed = self.settings.aligned(nbytes)
        if self.memory.numel() < needed:
            self.memory = self.memory.new_empty(0)  # free the old memory before allocating the new
            unaligned = torch.empty(needed + PAGE_BYTES, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
            start = -unaligned.data_ptr() % PAGE_BYTES  # O_DIRECT needs page alignment, which torch does not guarantee
            self.memory = unaligned[start : start + needed]

    def _wait_for_copy(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        self.copied, self.source = None, None

    def _submit(self, call: "_Call", start: int, nbytes: int) -> None:
        """Submit requests of one block each that transfer ``nbytes`` by ``call``."""
        memory = self.memory.numpy().data[: self.settings.aligned(nbytes)]
        for offset in range(0, len(memory), self.settings.block_size):
            block = memory[offset : offset + self.settings.block_size]
            self.futures.append(self.requests.submit(_transfer, call, self.file, block, start + offset))


_Call = Callable[[int, Sequence[memoryview], int], int]  # os.preadv or os.pwritev


def _transfer(call: _Call, file: _SwapFile, block: memoryview, start: int) -> None:
    """Transfer a whole block, with repeated calls if the kernel transfers only a part.

    Raises:
        OSError: the drive failed.
    """
    while block:
        moved = call(file.descriptor, [block], start)
        if not moved:
            raise OSError(f"the file ends at {start}")
        block, start = block[moved:], start + moved
