"""Swap file of one model on one rank, read and written with O_DIRECT by threads.

DeepSpeed's async_io (libaio) is not used: it takes minutes to compile on each machine, and a drive error ends the
process.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import Tensor

from lomo_ds.errors import OffloadError
from lomo_ds.zero3.nvme_settings import PAGE_BYTES, NvmeSettings, nameless_file

_Call = Callable[[int, Sequence[memoryview], int], int]  # os.preadv or os.pwritev


class SwapFile:
    """Unnamed file: it is deleted with the model, or with the process, however that ends.

    Reads and writes begin in the order in which they are asked for, each kind by itself, since one thread for each kind
    waits for the device. The threads end with the model too: nothing is waited for then, since the garbage collector
    may free it in a thread that holds locks.

    Args:
        device: the compute device.
    """

    def __init__(self, settings: NvmeSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.opened = _OpenFile(nameless_file(settings.path))
        self.requests = ThreadPoolExecutor(settings.requests_at_once, "lomo_ds-nvme")
        set_device = partial(_set_device, device)
        self.read_order = ThreadPoolExecutor(1, "lomo_ds-nvme-reads", set_device)
        self.write_order = ThreadPoolExecutor(1, "lomo_ds-nvme-writes", set_device)

    def reserve(self, start: int, nbytes: int) -> None:
        """Reserve a part of the file on the drive.

        Raises:
            OSError: the drive is full.
        """
        os.posix_fallocate(self.opened.descriptor, start, nbytes)

    def allocate(self, nbytes: int) -> Tensor:
        """Return host memory of whole pages from which the drive can be written, and the device copied to."""
        pinned = self.device.type != "cpu"
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        if memory.data_ptr() % PAGE_BYTES:  # O_DIRECT needs page alignment, which torch does not guarantee
            memory = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
            start = -memory.data_ptr() % PAGE_BYTES
            memory = memory[start : start + nbytes]
        return memory

    def start_read(self, memory: Tensor, start: int, after: torch.Event | None) -> "Transfer":
        """Start to fill ``memory`` from the file at ``start``, once ``after`` has happened."""
        return self._start(os.preadv, self.read_order, memory, start, after)

    def start_write(self, memory: Tensor, start: int, after: torch.Event | None) -> "Transfer":
        """Start to write ``memory`` to the file at ``start``, once ``after`` has happened."""
        return self._start(os.pwritev, self.write_order, memory, start, after)

    def _start(
        self, call: _Call, order: ThreadPoolExecutor, memory: Tensor, start: int, after: torch.Event | None
    ) -> "Transfer":
        submit = partial(_submit, self.requests, call, self.opened, memory, start, self.settings.block_size)
        if after is None:
            begun: Future[list[Future[None]]] = Future()
            begun.set_result(submit())
        else:
            begun = order.submit(_submit_after, after, submit)
        return Transfer(begun, self.settings)


class Transfer:
    """Pending read or write of host memory, which must not be used until it is finished."""

    def __init__(self, begun: "Future[list[Future[None]]]", settings: NvmeSettings) -> None:
        self.begun = begun
        self.settings = settings

    def finish(self) -> None:
        """Let the host wait for the drive.

        Raises:
            OffloadError: the drive failed.
        """
        requests = self.begun.result()
        wait(requests)  # all of them, since they use the memory
        for request in requests:
            if error := request.exception():
                raise OffloadError(
                    f"a shard in offload_param.nvme_path {self.settings.path} cannot be read or written: {error}; look "
                    "at the drive, then resume from the last checkpoint"
                ) from error


class _OpenFile:
    """Open file, closed when neither its ``SwapFile`` nor a pending request refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


def _set_device(device: torch.device) -> None:
    """Use the device of this rank in a new thread, where waiting for an event would otherwise start another one."""
    torch.get_device_module(device).set_device(device)


def _submit_after(event: torch.Event, submit: Callable[[], list[Future[None]]]) -> list[Future[None]]:
    event.synchronize()
    return submit()


def _submit(
    requests: ThreadPoolExecutor, call: _Call, file: _OpenFile, memory: Tensor, start: int, block_size: int
) -> list[Future[None]]:
    """Submit requests of one block each that transfer ``memory`` by ``call``."""
    view = memory.numpy().data
    return [
        requests.submit(_transfer, call, file, view[offset : offset + block_size], start + offset)
        for offset in range(0, len(view), block_size)
    ]


def _transfer(call: _Call, file: _OpenFile, block: memoryview, start: int) -> None:
    """Transfer a whole block, with repeated calls if the kernel transfers only a part.

    Raises:
        OSError: the drive failed.
    """
    while block:
        moved = call(file.descriptor, [block], start)
        if not moved:
            raise OSError(f"the file ends at {start}")
        block, start = block[moved:], start + moved
