"""The swap file by itself: reads and writes begin once the device has done its part, without the host."""

import errno
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.errors import OffloadError
from lomo_ds.zero3.nvme_settings import PAGE_BYTES, nvme_settings
from lomo_ds.zero3.swap_file import SwapFile
from tests.limits import HUNG
from tests.zero3.test_nvme import AIO, on_nvme


class DeviceEvent(threading.Event):
    """An event of a device that a test lets happen."""

    def synchronize(self) -> None:
        assert self.wait(HUNG)


class BrokenDevice:
    """An event of a device that has failed."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def open_file(folder: Path) -> SwapFile:
    settings = nvme_settings(on_nvme(str(folder)) | {"aio": AIO}, itemsize=4)
    file = SwapFile(settings, torch.device("cpu"))
    file.reserve(0, 4 * PAGE_BYTES)
    return file


def write(file: SwapFile, value: int, start: int = 0, after: Any = None) -> Any:
    """Start to write a page of equal bytes."""
    memory = file.allocate(PAGE_BYTES).fill_(value)
    return file.start_write(memory, start, after)


def read(file: SwapFile, start: int = 0) -> int:
    memory = file.allocate(PAGE_BYTES)
    file.start_read(memory, start, None).finish()
    assert len(memory.unique()) == 1
    return int(memory[0])


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lomo_ds-nvme")]


def test_a_write_waits_for_the_copy_to_its_memory(tmp_path: Path) -> None:
    file, copied = open_file(tmp_path), DeviceEvent()
    memory = file.allocate(PAGE_BYTES).fill_(1)
    pending: Any = copied
    transfer = file.start_write(memory, 0, pending)
    assert read(file) == 0
    memory.fill_(2)
    copied.set()
    transfer.finish()
    assert read(file) == 2


def test_a_write_begins_when_its_copy_has_ended_and_not_when_the_host_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, copied, written, pwritev = open_file(tmp_path), DeviceEvent(), threading.Event(), os.pwritev

    def write_and_tell(*arguments: Any) -> int:
        moved = pwritev(*arguments)
        written.set()
        return moved

    monkeypatch.setattr(os, "pwritev", write_and_tell)
    write(file, 1, after=copied)
    copied.set()
    assert written.wait(HUNG)


def test_a_read_waits_until_its_memory_has_been_copied_to_the_device(tmp_path: Path) -> None:
    file, copied = open_file(tmp_path), DeviceEvent()
    write(file, 2).finish()
    memory = file.allocate(PAGE_BYTES).fill_(1)
    pending: Any = copied
    transfer = file.start_read(memory, 0, pending)
    assert read(file) == 2  # by another read, which does not wait
    assert memory.unique().tolist() == [1]
    copied.set()
    transfer.finish()
    assert memory.unique().tolist() == [2]


def test_writes_that_wait_hold_up_no_read_and_keep_their_order(tmp_path: Path) -> None:
    file, events = open_file(tmp_path), [DeviceEvent(), DeviceEvent()]
    write(file, 3, start=PAGE_BYTES).finish()
    transfers = [write(file, value, after=event) for value, event in enumerate(events, start=1)]
    events[1].set()
    assert read(file, start=PAGE_BYTES) == 3
    assert read(file) == 0, "the second write waits for the first"
    events[0].set()
    for transfer in transfers:
        transfer.finish()


def test_a_drive_that_fails_after_the_copy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, copied = open_file(tmp_path), DeviceEvent()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", fail)
    transfer = write(file, 1, after=copied)
    copied.set()
    with pytest.raises(OffloadError, match=f"{tmp_path} cannot be read or written: .*Input/output error; look at"):
        transfer.finish()


def test_a_device_that_fails_is_told_and_the_next_write_is_done(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    transfer = write(file, 1, after=BrokenDevice())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        transfer.finish()
    write(file, 2, after=_happened()).finish()
    assert read(file) == 2


def _happened() -> DeviceEvent:
    event = DeviceEvent()
    event.set()
    return event


def test_a_file_is_closed_when_the_last_write_of_a_freed_model_has_ended(tmp_path: Path) -> None:
    file, copied = open_file(tmp_path), DeviceEvent()
    descriptor = file.opened.descriptor
    write(file, 1, after=copied)
    assert threads()
    del file
    gc.collect()  # waits for nothing
    assert os.fstat(descriptor).st_nlink == 0, "open until the write has ended"
    copied.set()
    while threads():  # that which waited, and then that which writes
        threads()[0].join(HUNG)  # of any file, all of which were freed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
