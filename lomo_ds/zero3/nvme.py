"""Shards in a file on NVMe, read and written past the page cache (O_DIRECT) by threads that wait for the drive.

DeepSpeed's own swapper keeps a buffer for every parameter that is gathered, each as large as the largest shard. Here
a shard only passes through one, in pieces where it is larger: what few buffers hold bounds the host memory. Its
async_io (libaio) is not used either: it takes minutes to compile on each machine, and an error of the drive ends the
process.
"""

import contextlib
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

Group = tuple["SwapSlot", ...]  # what is gathered at once


class SwapSpace:
    """The file of one model on one rank, and the buffers that its contents pass through.

    The file has no name: it is gone with the model, or with the process, however that ends, and any number of jobs
    and ranks may share an ``nvme_path``.

    Args:
        device: the one that computes.
    """

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.descriptor = nameless_file(settings.path)
        self.requests = ThreadPoolExecutor(settings.requests_at_once, "lomo_ds-nvme")
        self.end = 0  # bytes
        self.vacant: dict[int, list[int]] = defaultdict(list)  # where places of a size are that nobody uses any more
        self.buffers: list[_IoBuffer] = []
        self.free: deque[_IoBuffer] = deque()
        self.writing: deque[tuple[SwapSlot, _IoBuffer]] = deque()
        self.ahead: dict[SwapSlot, _IoBuffer] = {}  # whose first piece is being read before anyone has asked
        self.expected: list[SwapSlot] = []  # what will be read next, in order
        self.last: tuple[Group, Group] = ((), ())  # what was gathered before the last and what last
        self.followers: dict[tuple[Group, Group], Group] = {}
        self.guard = threading.RLock()  # a checkpoint may be written by another thread
        weakref.finalize(self, _clean_up, self.descriptor, self.buffers, self.requests, os.getpid())

    def takes(self, nbytes: int) -> bool:
        """Whether a shard is large enough for a place."""
        return nbytes >= self.settings.block_size

    def allocate_slot(self, numel: int, dtype: torch.dtype) -> "SwapSlot":
        """A place for that many elements, its room on the drive taken.

        Raises:
            ConfigError: the drive is full.
        """
        nbytes = self.settings.aligned(numel * dtype.itemsize)
        if self.vacant[nbytes]:
            return SwapSlot(self, self.vacant[nbytes].pop(), numel, dtype)
        try:
            os.posix_fallocate(self.descriptor, self.end, nbytes)
        except OSError as error:
            raise ConfigError(
                f"offload_param.nvme_path {self.settings.path} cannot hold a shard of {nbytes / 2**20:.1f} MiB beside "
                f"{self.end / 2**20:.1f} MiB: {error.strerror}; make room, or use more ranks or another path"
            ) from None
        self.end += nbytes
        return SwapSlot(self, self.end - nbytes, numel, dtype)

    def expect(self, places: Sequence["SwapSlot"]) -> None:
        """``places`` are read next, and then, it is assumed, what followed the last time.

        It takes two gatherings to tell forward from backward.
        """
        with self.guard:
            group = tuple(places)
            self.followers[self.last] = group
            self.last = (self.last[1], group)
            self.expected = [*group, *self.followers.get(self.last, ())]

    def read(self, place: "SwapSlot", into: Tensor) -> None:
        """Fill ``into`` (1-D, on any device) with what the place begins with."""
        flat = into.view(torch.uint8)
        if not flat.numel():
            return
        with self.guard:
            self._finish_writes(place)
            coming = self.ahead.pop(place, None)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                lane = coming or self._begin_read(place, start)
                lane.finish()
                behind = start + self.settings.piece_bytes
                coming = self._begin_read(place, behind) if behind < flat.numel() else None
                lane.copy_out(flat[start:behind])
                self.free.append(lane)
            if self.expected and self.expected[0] is place:
                self.expected.pop(0)
                self._read_ahead()

    def write(self, place: "SwapSlot", values: Tensor) -> None:
        """Begin to write ``values`` (1-D, on any device, not written to any more) to where the place begins."""
        flat = values.detach().view(torch.uint8)
        with self.guard:
            self._finish_writes(place)
            if place in self.ahead:
                self._drop(place)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                piece = flat[start : start + self.settings.piece_bytes]
                lane = self._take()
                lane.copy_in(piece, place.start + start)
                self.writing.append((place, lane))
            for _, lane in self.writing:
                lane.start_write()

    def finish(self) -> None:
        """Wait until everything is written."""
        with self.guard:
            while self.writing:
                self._finish_oldest_write()

    def _begin_read(self, place: "SwapSlot", start: int) -> "_IoBuffer":
        lane = self._take()
        lane.start_read(place.start + start, min(place.nbytes - start, self.settings.piece_bytes))
        return lane

    def _take(self) -> "_IoBuffer":
        """A lane that nothing is under way in."""
        if not self.free and len(self.buffers) < self.settings.buffer_count:
            self.buffers.append(_IoBuffer(self.settings, self.device, self.descriptor, self.requests))
            return self.buffers[-1]
        if not self.free and self.ahead:
            self._drop(next(iter(self.ahead)))
        if not self.free:
            self._finish_oldest_write()
        return self.free.popleft()

    def _drop(self, place: "SwapSlot") -> None:
        lane = self.ahead.pop(place)
        lane.finish()
        self.free.append(lane)

    def _finish_writes(self, place: "SwapSlot") -> None:
        while any(written is place for written, _ in self.writing):
            self._finish_oldest_write()

    def _finish_oldest_write(self) -> None:
        _, lane = self.writing.popleft()
        lane.finish()
        self.free.append(lane)

    def _read_ahead(self) -> None:
        """Begin to read what is expected next, as far as there are buffers and nobody is writing it."""
        wanted = self.expected[: self.settings.buffer_count // 2]
        for place in self.ahead.keys() - set(wanted):
            self._drop(place)
        for place in wanted:
            if any(written is place for written, _ in self.writing):
                return
            if place not in self.ahead and (self.free or len(self.buffers) < self.settings.buffer_count):
                self.ahead[place] = self._begin_read(place, 0)


class SwapSlot:
    """Where a shard lies in the file; another may take it when nobody refers to it any more.

    Args:
        start: in bytes.
        numel: of the shard with its padding.
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
        """The first ``numel`` elements in new memory of ``device``; see ``SwapSpace.read``."""
        tensor = torch.empty(numel, dtype=self.dtype, device=device)
        self.space.read(self, tensor)
        return tensor

    def write(self, values: Tensor) -> None:
        """Begin to write ``values`` to its beginning; see ``SwapSpace.write``."""
        assert values.dtype == self.dtype
        self.space.write(self, values)

    def copy(self) -> "SwapSlot":
        """Another place with the same contents."""
        other = self.space.allocate_slot(self.numel, self.dtype)
        other.write(self.read(self.numel))
        return other


class _IoBuffer:
    """A buffer through which one read or write at a time goes."""

    def __init__(
        self, settings: NvmeSettings, device: torch.device, descriptor: int, requests: ThreadPoolExecutor
    ) -> None:
        self.settings = settings
        self.device = device
        self.descriptor = descriptor
        self.requests = requests
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.streams = torch.get_device_module(device)
        self.downward = self.streams.Stream(device)
        self.copied: torch.Event | None = None  # the device's last use of the buffer
        self.source: Tensor | None = None  # what is on its way into the buffer
        self.target: tuple[int, int] | None = None  # where it is to be written: start and bytes
        self.under_way: list[Future[None]] = []

    def start_read(self, start: int, nbytes: int) -> None:
        """Begin to read into the buffer."""
        self._reserve(nbytes)
        self._submit(os.preadv, start, nbytes)

    def copy_out(self, into: Tensor) -> None:
        """Copy what was read to ``into``, in the current stream of the device."""
        into.copy_(self.buffer[: into.numel()], non_blocking=True)
        if into.device.type != "cpu":
            self.copied = self.streams.current_stream(self.device).record_event()

    def copy_in(self, values: Tensor, start: int) -> None:
        """Copy ``values`` into the buffer, beside what is computed, to be written from there."""
        self._reserve(values.numel())
        self.downward.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.downward):
            self.buffer[: values.numel()].copy_(values, non_blocking=True)
            if values.device.type != "cpu":
                self.copied = self.downward.record_event()
        self.source, self.target = values, (start, values.numel())

    def start_write(self, wait: bool = False) -> None:
        """Begin the write that ``copy_in`` was for, if its values have arrived."""
        if self.target is not None and (wait or self.copied is None or self.copied.query()):
            self._wait_for_copy()
            (start, nbytes), self.target = self.target, None
            self._submit(os.pwritev, start, nbytes)

    def finish(self) -> None:
        """Wait for what is under way.

        Raises:
            OffloadError: the drive could not do it.
        """
        self.start_write(wait=True)
        requests, self.under_way = self.under_way, []
        wait(requests)  # all of them, as they use the buffer
        for request in requests:
            if error := request.exception():
                raise OffloadError(
                    f"a shard in offload_param.nvme_path {self.settings.path} cannot be read or written: {error}; look "
                    "at the drive, then resume from the last checkpoint"
                ) from error

    def _reserve(self, nbytes: int) -> None:
        """Let the buffer, which nobody uses any more, have that size at least."""
        self._wait_for_copy()
        wanted = self.settings.aligned(nbytes)
        if self.buffer.numel() < wanted:
            self.buffer = self.buffer.new_empty(0)  # the old memory is free before the new is taken
            memory = torch.empty(wanted + PAGE_BYTES, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
            start = -memory.data_ptr() % PAGE_BYTES  # which O_DIRECT wants, and torch promises nobody
            self.buffer = memory[start : start + wanted]

    def _wait_for_copy(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        self.copied, self.source = None, None

    def _submit(self, call: "_Call", start: int, nbytes: int) -> None:
        """Let ``call`` move that many bytes, in requests of a block each."""
        memory = self.buffer.numpy().data[: self.settings.aligned(nbytes)]
        for behind in range(0, len(memory), self.settings.block_size):
            block = memory[behind : behind + self.settings.block_size]
            self.under_way.append(self.requests.submit(_transfer, call, self.descriptor, block, start + behind))


_Call = Callable[[int, Sequence[memoryview], int], int]  # os.preadv or os.pwritev


def _transfer(call: _Call, descriptor: int, block: memoryview, start: int) -> None:
    """Move a whole block, of which the kernel may move a part only.

    Raises:
        OSError: of the drive.
    """
    while block:
        moved = call(descriptor, [block], start)
        if not moved:
            raise OSError(f"the file ends at {start}")
        block, start = block[moved:], start + moved


def _clean_up(descriptor: int, lanes: list[_IoBuffer], requests: ThreadPoolExecutor, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has no part in what is under way
        for lane in lanes:
            lane.target = None
            with contextlib.suppress(OffloadError):  # nobody reads it any more
                lane.finish()
        requests.shutdown()
    os.close(descriptor)
