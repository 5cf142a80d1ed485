"""Swap space for shards on NVMe: slots of a swap file, and the host memory that shards pass through.

DeepSpeed's own swapper keeps one buffer for every gathered parameter, each as large as the largest shard. Here shards
pass through a few buffers, in pieces if they are larger, which bounds the host memory.
"""

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, takewhile
from typing import Any

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError
from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES, PinnedMemory
from lomo_ds.zero3.nvme_settings import NvmeSettings
from lomo_ds.zero3.read_order import ReadOrder
from lomo_ds.zero3.swap_file import SwapFile, Transfer

_Piece = tuple["SwapSlot", int]  # a part of a slot: its first byte


class SwapSpace:
    """Slots of one model on one rank, and the buffers between the drive and the device.

    Any number of jobs and ranks may share an ``nvme_path``. The drive works by itself: a read begins when the device
    has emptied its buffer, and a write when the device has filled it. The host waits for a read when its shard is
    needed, and for the oldest write when there is no other buffer.

    Args:
        device: the compute device.

    Attributes:
        max_leaving_bytes: limit on device memory held by shards that are being copied to buffers.
    """

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.max_leaving_bytes = IN_FLIGHT_BYTES
        self.file = SwapFile(settings, device)
        self.streams = torch.get_device_module(device)
        self.copy_stream = self.streams.Stream(device)
        self.small = PinnedMemory(device, 0)
        self.end = 0  # bytes of the file
        self.vacant: dict[int, list[int]] = defaultdict(list)  # offsets of free slots, by size
        self.buffers: list[_IoBuffer] = []
        self.free: deque[_IoBuffer] = deque()
        self.writing: deque[tuple[SwapSlot, _IoBuffer]] = deque()
        self.leaving: deque[tuple[Tensor, torch.Event]] = deque()  # device tensors that are being copied to buffers
        self.ahead: dict[_Piece, _IoBuffer] = {}  # buffers that prefetch a piece
        self.order: ReadOrder[SwapSlot] = ReadOrder()
        self.lock = threading.RLock()  # a checkpoint may be written by another thread, which reads slots

    def accepts(self, nbytes: int) -> bool:
        """Return whether a shard is large enough to be stored here."""
        return nbytes >= self.settings.block_size

    def pin(self, shard: Tensor) -> Tensor:
        """Return a copy in pinned memory of a shard that is too small; a copy to other memory blocks the host."""
        return self.small.empty_like(shard).copy_(shard)

    def allocate_slot(self, numel: int, dtype: torch.dtype) -> "SwapSlot":
        """Allocate a slot for ``numel`` elements, with its space on the drive.

        Raises:
            ConfigError: the drive is full.
        """
        nbytes = self.settings.aligned(numel * dtype.itemsize)
        if self.vacant[nbytes]:
            return SwapSlot(self, self.vacant[nbytes].pop(), numel, dtype)
        try:
            self.file.reserve(self.end, nbytes)
        except OSError as error:
            raise ConfigError(
                f"offload_param.nvme_path {self.settings.path} cannot hold a shard of {nbytes / 2**20:.1f} MiB beside "
                f"{self.end / 2**20:.1f} MiB: {error.strerror}; make room, or use more ranks or another path"
            ) from None
        self.end += nbytes
        return SwapSlot(self, self.end - nbytes, numel, dtype)

    def expect(self, slots: Sequence["SwapSlot"]) -> None:
        """Announce that ``slots`` are read next, all of each; see ``ReadOrder``."""
        with self.lock:
            self.order.announce(slots)
            self._read_ahead()

    def read(self, slot: "SwapSlot", into: Tensor) -> None:
        """Fill ``into`` (1-D, on any device) with the first bytes of ``slot``."""
        flat = into.view(torch.uint8)
        starts = range(0, flat.numel(), self.settings.piece_bytes)
        with self.lock:
            self._finish_writes(slot)
            self.order.note_read(slot)
            for start in starts:
                buffer = self.ahead.pop((slot, start), None) or self._start_read((slot, start))
                self._read_ahead((slot, later) for later in starts if later > start)
                try:
                    buffer.copy_out(flat[start : start + self.settings.piece_bytes])
                finally:
                    self.free.append(buffer)
            self._read_ahead()

    def write(self, slot: "SwapSlot", values: Tensor) -> None:
        """Start to write ``values`` to the beginning of ``slot``; the caller must not change them afterwards.

        Args:
            values: 1-D, on any device.
        """
        flat = values.detach().view(torch.uint8)
        with self.lock:
            self._finish_writes(slot)
            for piece in [piece for piece in self.ahead if piece[0] is slot]:
                self._drop(piece)
            self.order.note_write(slot)
            self.copy_stream.wait_stream(self.streams.current_stream(self.device))
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                buffer = self._acquire()
                self.writing.append((slot, buffer))
                buffer.start_write(flat[start : start + self.settings.piece_bytes], slot.start + start)
            self._keep(values)

    def finish(self) -> None:
        """Wait until all writes are finished."""
        with self.lock:
            while self.writing:
                self._finish_oldest_write()
            self._release(0)
            self._read_ahead()

    def _acquire(self) -> "_IoBuffer":
        """Return a free buffer or a new one; if there is neither, wait for the oldest write."""
        if not self.free and len(self.buffers) < self.settings.piece_count:
            self.buffers.append(_IoBuffer(self.settings, self.file, self.copy_stream, self.streams))
            return self.buffers[-1]
        if not self.free:
            self._finish_oldest_write()
        return self.free.popleft()

    def _start_read(self, piece: _Piece) -> "_IoBuffer":
        slot, start = piece
        buffer = self._acquire()
        buffer.start_read(slot.start + start, min(slot.nbytes - start, self.settings.piece_bytes))
        return buffer

    def _read_ahead(self, first: Iterable[_Piece] = ()) -> None:
        """Prefetch the pieces that are expected next into at most half of the buffers, as long as any is free.

        Args:
            first: pieces that are read before those.
        """
        written = {slot for slot, _ in self.writing}
        upcoming = takewhile(lambda piece: piece[0] not in written, chain(first, self._pieces_expected()))
        wanted = dict.fromkeys(islice(upcoming, self.settings.piece_count // 2))
        for piece in self.ahead.keys() - wanted:
            self._drop(piece)
        for piece in wanted:
            if piece not in self.ahead and (self.free or len(self.buffers) < self.settings.piece_count):
                self.ahead[piece] = self._start_read(piece)

    def _pieces_expected(self) -> Iterator[_Piece]:
        for slot in self.order.upcoming():
            for start in range(0, slot.nbytes, self.settings.piece_bytes):
                yield slot, start

    def _drop(self, piece: _Piece) -> None:
        """Give up a prefetch; its buffer is used again when it has ended."""
        self.free.append(self.ahead.pop(piece))

    def _finish_writes(self, slot: "SwapSlot") -> None:
        while any(written is slot for written, _ in self.writing):
            self._finish_oldest_write()

    def _finish_oldest_write(self) -> None:
        _, buffer = self.writing.popleft()
        self.free.append(buffer)
        buffer.finish()

    def _keep(self, values: Tensor) -> None:
        """Keep a tensor alive while it is copied to buffers; at most ``max_leaving_bytes``, or one larger tensor."""
        if values.device.type != "cpu":
            self.leaving.append((values, self.copy_stream.record_event()))
            self._release(self.max_leaving_bytes)

    def _release(self, limit: int) -> None:
        """Let the compute stream wait for the oldest copies, whose memory it then uses again."""
        while len(self.leaving) > bool(limit) and sum(values.nbytes for values, _ in self.leaving) > limit:
            _, copied = self.leaving.popleft()
            self.streams.current_stream(self.device).wait_event(copied)


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


class _IoBuffer:
    """Host memory for one read or write at a time; the next use of it waits for the previous one.

    Args:
        copy_stream: of copies from the device.
        streams: module of the device.
    """

    def __init__(self, settings: NvmeSettings, file: SwapFile, copy_stream: torch.Stream, streams: Any) -> None:
        self.settings = settings
        self.file = file
        self.copy_stream = copy_stream
        self.streams = streams
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: torch.Event | None = None  # end of the device's last use of the memory
        self.transfer: Transfer | None = None  # the drive's last use of it

    def start_read(self, start: int, nbytes: int) -> None:
        """Start to read from the file at ``start``, once the device has emptied the buffer."""
        pages = self._reserve(nbytes)
        self.transfer = self.file.start_read(pages, start, self.copied)

    def copy_out(self, into: Tensor) -> None:
        """Wait for the read, and copy the contents to ``into`` in the current stream of the device."""
        self.finish()
        into.copy_(self.memory[: into.numel()], non_blocking=True)
        self.copied = None if into.device.type == "cpu" else self._record(self.streams.current_stream(into.device))

    def start_write(self, values: Tensor, start: int) -> None:
        """Start to copy ``values`` to the buffer, and then from it to the file at ``start``."""
        pages = self._reserve(values.numel())
        if self.copied is not None:
            self.copy_stream.wait_event(self.copied)
        with self.streams.stream(self.copy_stream):
            self.memory[: values.numel()].copy_(values, non_blocking=True)
        self.copied = None if values.device.type == "cpu" else self._record(self.copy_stream)
        self.transfer = self.file.start_write(pages, start, self.copied)

    def finish(self) -> None:
        """Wait for the pending read or write.

        Raises:
            OffloadError: the drive failed.
        """
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            transfer.finish()

    def _record(self, stream: torch.Stream) -> torch.Event:
        """Return an event at the end of a stream; a thread that waits for it sleeps."""
        event: torch.Event = self.streams.Event(blocking=True)
        stream.record_event(event)
        return event

    def _reserve(self, nbytes: int) -> Tensor:
        """Wait for a read that was given up, and return memory for ``nbytes`` in whole pages."""
        self.finish()
        needed = self.settings.aligned(nbytes)
        if self.memory.numel() < needed:
            if self.copied is not None:
                self.copied.synchronize()
            self.memory = self.memory.new_empty(0)  # free the old memory before allocating the new
            self.memory = self.file.allocate(needed)
        return self.memory[:needed]
