"""A simulated drive: its reads and writes are operations of streams of their own, and no file exists."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomo_ds import zero3
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.streams import SimulatedEvent, SimulatedStream, Streams
from lomo_ds.zero3 import nvme


class SimulatedSwapFile:
    """``zero3.swap_file.SwapFile`` of a rank; all ranks of its host do the same at the same time, on one drive."""

    def __init__(self, streams: Streams, ranks_on_host: int, *arguments: Any) -> None:
        self.ranks_on_host = ranks_on_host
        self.reads, self.writes = SimulatedStream(streams, "nvme reads"), SimulatedStream(streams, "nvme writes")

    def reserve(self, start: int, nbytes: int) -> None:
        """Do nothing: a simulated drive is never full."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def start_read(self, memory: Tensor, start: int, after: SimulatedEvent | None) -> "SimulatedTransfer":
        """Add a read."""
        return self._add(self.reads, "nvme read", memory, after)

    def start_write(self, memory: Tensor, start: int, after: SimulatedEvent | None) -> "SimulatedTransfer":
        """Add a write."""
        return self._add(self.writes, "nvme write", memory, after)

    def _add(
        self, stream: SimulatedStream, name: str, memory: Tensor, after: SimulatedEvent | None
    ) -> "SimulatedTransfer":
        if after is not None:
            stream.wait_event(after)
        stream.add(name, Work(disk=memory.nbytes * self.ranks_on_host))
        return SimulatedTransfer(stream)


class SimulatedTransfer:
    """``zero3.swap_file.Transfer`` that is at the end of a stream."""

    def __init__(self, stream: SimulatedStream) -> None:
        self.ended = stream.record_event()

    def finish(self) -> None:
        """Let the host wait for the drive."""
        self.ended.synchronize()


def install_drive(streams: Streams, ranks_on_host: int) -> None:
    """Use simulated drives for the rest of the process."""
    vars(nvme)["SwapFile"] = partial(SimulatedSwapFile, streams, ranks_on_host)
    vars(zero3)["validate_nvme"] = lambda ds_config, itemsize: None
