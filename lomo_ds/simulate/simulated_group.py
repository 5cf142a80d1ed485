"""A simulated process group: this process is rank 0, and the other ranks do the same at the same time.

Like NCCL it has a stream of its own, which waits for the current stream when a collective starts; the current stream
waits for the collective when its handle is waited for.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from lomo_ds.distributed.process_group import start_process_group
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.streams import SimulatedStream, Streams


class _Handle:
    """Handle of a collective."""

    def __init__(self, stream: SimulatedStream) -> None:
        self.streams = stream.streams
        self.ended = stream.record_event()

    def wait(self) -> None:
        """Let the current stream wait."""
        self.streams.current.wait_event(self.ended)


class SimulatedCollectives:
    """The functions of ``torch.distributed`` that the engine and DeepSpeed call in a step."""

    def __init__(self, streams: Streams, world_size: int) -> None:
        self.streams, self.world_size = streams, world_size
        self.stream = SimulatedStream(streams, "NCCL")

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> _Handle | None:
        """Send this rank's part to each peer."""
        return self._start("all-gather", output_tensor.nbytes - input_tensor.nbytes, async_op)

    def reduce_scatter_tensor(
        self, output: Tensor, input: Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> _Handle | None:
        """Send every part but this rank's to its owner."""
        return self._start("reduce-scatter", input.nbytes - output.nbytes, async_op)

    def all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> _Handle | None:
        """Reduce parts, and gather the results."""
        others = (self.world_size - 1) / self.world_size
        return self._start("all-reduce", int(2 * tensor.nbytes * others), async_op)

    def broadcast(self, tensor: Tensor, src: int = 0, group: Any = None, async_op: bool = False) -> _Handle | None:
        """Send a tensor around."""
        return self._start("broadcast", tensor.nbytes, async_op)

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        """Fill in the same object for every rank."""
        object_list[:] = [obj] * len(object_list)

    def barrier(self, *arguments: Any, **options: Any) -> None:
        """Do nothing: the ranks are never apart."""

    def _start(self, name: str, sent: int, async_op: bool) -> _Handle | None:
        self.stream.wait_stream(self.streams.current)
        self.stream.add(name, Work(sent=sent))
        handle = _Handle(self.stream)
        if async_op:
            return handle
        handle.wait()
        return None


def start_simulated_group(streams: Streams, world_size: int, ranks_on_host: int) -> None:
    """Make this process rank 0 of ``world_size`` ranks, for the rest of the process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(ranks_on_host)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    collectives = SimulatedCollectives(streams, world_size)
    names = [name for name in vars(SimulatedCollectives) if not name.startswith("_")]
    for module in (torch.distributed, distributed_c10d):
        vars(module).update({name: getattr(collectives, name) for name in names})
    start_process_group()  # after that, because deepspeed looks the functions up
