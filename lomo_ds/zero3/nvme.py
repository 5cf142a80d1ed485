"""Shards in files on NVMe, read and written by DeepSpeed's async_io (libaio with O_DIRECT).

DeepSpeed's own swapper keeps a buffer for every parameter that is gathered, each as large as the largest shard. Here
a shard only passes through one, in pieces where it is larger: what few buffers hold bounds the host memory.
"""

import fcntl
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

from lomo_ds.errors import ConfigError, OffloadError
from lomo_ds.zero3.nvme_settings import NvmeSettings

FOLDER_PREFIX = "lomo_ds-"
LOCK = "lock"  # held as long as the process lives that owns the folder


class SwapSpace:
    """The files of one model on one rank, in a folder of their own, and the buffers that their contents pass through.

    The folder is removed with the model or at the end of the process; what a killed process has left, by the next
    one that uses the same ``nvme_path``.

    Args:
        device: the one that computes.
    """

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.folder, lock = _own_folder(settings.path)
        self.files = 0
        self.lanes: list[_Lane] = []
        self.free: deque[_Lane] = deque()
        self.writing: deque[tuple[SwapFile, _Lane]] = deque()
        self.ahead: dict[SwapFile, _Lane] = {}  # whose first piece is being read before anyone has asked
        self.last: tuple[SwapFile | None, SwapFile | None] = (None, None)  # gathered last, and before that
        self.followers: dict[tuple[SwapFile | None, SwapFile | None], SwapFile] = {}
        self.guard = threading.RLock()  # a checkpoint may be written by another thread
        weakref.finalize(self, _clean_up, self.folder, lock, self.lanes, os.getpid())

    def takes(self, nbytes: int) -> bool:
        """Whether a shard is large enough to lie in a file."""
        return nbytes >= self.settings.block_size

    def new_file(self, numel: int, dtype: torch.dtype) -> "SwapFile":
        """A file for that many elements, its room on the drive taken.

        Raises:
            ConfigError: the drive is full.
        """
        self.files += 1
        file = SwapFile(self, self.folder / f"{self.files}.swp", numel, dtype)
        try:
            with file.path.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, self.settings.aligned(file.nbytes))
        except OSError as error:
            raise ConfigError(
                f"offload_param.nvme_path {self.settings.path} cannot hold a shard of {file.nbytes / 2**20:.1f} MiB: "
                f"{error.strerror}; make room, or use more ranks or another path"
            ) from None
        return file

    def read(self, file: "SwapFile", into: Tensor, look_ahead: bool = False) -> None:
        """Fill ``into`` (1-D, on any device) with what the file begins with.

        Args:
            look_ahead: begin to read the files that followed it the last time.
        """
        flat = into.view(torch.uint8)
        if not flat.numel():
            return
        with self.guard:
            self._finish_writes(file)
            coming = self.ahead.pop(file, None)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                lane = coming or self._begin_read(file, start)
                lane.finish()
                behind = start + self.settings.piece_bytes
                coming = self._begin_read(file, behind) if behind < flat.numel() else None
                lane.copy_out(flat[start:behind])
                self.free.append(lane)
            if look_ahead:
                self._look_ahead(file)

    def write(self, file: "SwapFile", values: Tensor) -> None:
        """Begin to write ``values`` (1-D, on any device, not written to any more) to where the file begins."""
        flat = values.detach().view(torch.uint8)
        with self.guard:
            self._finish_writes(file)
            if file in self.ahead:
                self._drop(file)
            for start in range(0, flat.numel(), self.settings.piece_bytes):
                piece = flat[start : start + self.settings.piece_bytes]
                lane = self._take()
                lane.copy_in(piece, file.path, start)
                self.writing.append((file, lane))
            for _, lane in self.writing:
                lane.start_write()

    def finish(self) -> None:
        """Wait until everything is written."""
        with self.guard:
            while self.writing:
                self._finish_oldest_write()

    def _begin_read(self, file: "SwapFile", start: int) -> "_Lane":
        lane = self._take()
        lane.start_read(file.path, start, min(file.nbytes - start, self.settings.piece_bytes))
        return lane

    def _take(self) -> "_Lane":
        """A lane that nothing is under way in."""
        if not self.free and len(self.lanes) < self.settings.buffer_count:
            self.lanes.append(_Lane(self.settings, self.device))
            return self.lanes[-1]
        if not self.free and self.ahead:
            self._drop(next(iter(self.ahead)))
        if not self.free:
            self._finish_oldest_write()
        return self.free.popleft()

    def _drop(self, file: "SwapFile") -> None:
        lane = self.ahead.pop(file)
        lane.finish()
        self.free.append(lane)

    def _finish_writes(self, file: "SwapFile") -> None:
        while any(written is file for written, _ in self.writing):
            self._finish_oldest_write()

    def _finish_oldest_write(self) -> None:
        _, lane = self.writing.popleft()
        lane.finish()
        self.free.append(lane)

    def _look_ahead(self, file: "SwapFile") -> None:
        """Read what the last two files were followed by before: it tells forward from backward."""
        self.followers[self.last] = file
        self.last = (self.last[1], file)
        pair, expected = self.last, list[SwapFile]()
        while len(expected) < self.settings.buffer_count // 2 and pair in self.followers:
            expected.append(self.followers[pair])
            pair = (pair[1], expected[-1])
        for stale in self.ahead.keys() - set(expected):
            self._drop(stale)
        for next_file in expected:
            if any(written is next_file for written, _ in self.writing) or next_file is file:
                return
            if next_file not in self.ahead and (self.free or len(self.lanes) < self.settings.buffer_count):
                self.ahead[next_file] = self._begin_read(next_file, 0)


class SwapFile:
    """One shard in a file; the file is removed with it.

    Args:
        numel: of the shard with its padding.
    """

    def __init__(self, space: SwapSpace, path: Path, numel: int, dtype: torch.dtype) -> None:
        self.space = space
        self.path = path
        self.numel = numel
        self.dtype = dtype
        self.nbytes = numel * dtype.itemsize
        weakref.finalize(self, _unlink, path, os.getpid()).atexit = False  # the folder goes as a whole then

    def read(self, numel: int, device: torch.device | str = "cpu", look_ahead: bool = False) -> Tensor:
        """The first ``numel`` elements in new memory of ``device``; see ``SwapSpace.read``."""
        tensor = torch.empty(numel, dtype=self.dtype, device=device)
        self.space.read(self, tensor, look_ahead)
        return tensor

    def write(self, values: Tensor) -> None:
        """Begin to write ``values`` to its beginning; see ``SwapSpace.write``."""
        assert values.dtype == self.dtype
        self.space.write(self, values)

    def copy(self) -> "SwapFile":
        """Another file with the same contents."""
        other = self.space.new_file(self.numel, self.dtype)
        self.space.finish()
        try:
            shutil.copyfile(self.path, other.path)
        except OSError as error:
            raise OffloadError(f"{self.path} cannot be copied: {error.strerror}") from None
        return other


class _Lane:
    """A buffer with a handle of its own; one read or write at a time is under way in it."""

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.handle: Any = AsyncIOBuilder().load(verbose=False).aio_handle(*settings.handle_arguments)
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.streams = torch.get_device_module(device)
        self.downward = self.streams.Stream(device)
        self.copied: torch.Event | None = None  # the device's last use of the buffer
        self.source: Tensor | None = None  # what is on its way into the buffer
        self.target: tuple[Path, int, int] | None = None  # where it is to be written: file, offset, bytes
        self.moving: Path | None = None

    def start_read(self, path: Path, start: int, nbytes: int) -> None:
        """Begin to read into the buffer."""
        self._reserve(nbytes)
        self._submit(self.handle.async_pread, path, start, nbytes)

    def copy_out(self, into: Tensor) -> None:
        """Copy what was read to ``into``, in the current stream of the device."""
        into.copy_(self.buffer[: into.numel()], non_blocking=True)
        if into.device.type != "cpu":
            self.copied = self.streams.current_stream(self.device).record_event()

    def copy_in(self, values: Tensor, path: Path, start: int) -> None:
        """Copy ``values`` into the buffer, beside what is computed, to be written from there."""
        self._reserve(values.numel())
        self.downward.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.downward):
            self.buffer[: values.numel()].copy_(values, non_blocking=True)
            if values.device.type != "cpu":
                self.copied = self.downward.record_event()
        self.source, self.target = values, (path, start, values.numel())

    def start_write(self, wait: bool = False) -> None:
        """Begin the write that ``copy_in`` was for, if its values have arrived."""
        if self.target is not None and (wait or self.copied is None or self.copied.query()):
            self._wait_for_copy()
            (path, start, nbytes), self.target = self.target, None
            self._submit(self.handle.async_pwrite, path, start, nbytes)

    def finish(self) -> None:
        """Wait for what is under way."""
        self.start_write(wait=True)
        if self.moving is not None:
            path, self.moving = self.moving, None
            if self.handle.wait() != 1:
                raise OffloadError(f"{path} cannot be read or written; see what DeepSpeed's async_io says above")

    def _reserve(self, nbytes: int) -> None:
        """Let the buffer, which nobody uses any more, have that size at least."""
        self._wait_for_copy()
        wanted = self.settings.aligned(nbytes)
        if self.buffer.numel() < wanted:
            self.release()
            if self.device.type == "cpu":
                self.buffer = self.handle.new_cpu_locked_tensor(wanted, self.buffer)
            else:
                self.buffer = torch.empty(wanted, dtype=torch.uint8, pin_memory=True)

    def release(self) -> None:
        """Give the buffer's memory back; nothing may be under way."""
        if self.device.type == "cpu" and self.buffer.numel():
            self.handle.free_cpu_locked_tensor(self.buffer)
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def _wait_for_copy(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        self.copied, self.source = None, None

    def _submit(self, action: Any, path: Path, start: int, nbytes: int) -> None:
        if action(self.buffer[: self.settings.aligned(nbytes)], str(path), start) != 0:
            raise OffloadError(f"{path} cannot be read or written; see what DeepSpeed's async_io says above")
        self.moving = path


def _own_folder(path: Path) -> tuple[Path, TextIOWrapper]:
    """A new folder in ``path``, and the open file whose lock says that its owner lives."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=path))
        lock = (folder / "unlocked").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "unlocked").rename(folder / LOCK)  # so that nobody sees it before it is locked
    except OSError as error:
        raise ConfigError(f"offload_param.nvme_path {path} cannot be written: {error.strerror}") from None
    return folder, lock


def _remove_abandoned(path: Path) -> None:
    """Remove the folders in ``path`` whose owners were killed."""
    for folder in path.glob(FOLDER_PREFIX + "*"):
        try:
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it is in use, or someone else's, or not locked yet
            continue


def _clean_up(folder: Path, lock: TextIOWrapper, lanes: list[_Lane], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has no part in it
        return
    for lane in lanes:
        lane.target = None
        lane.finish()
        lane.release()
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _unlink(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
