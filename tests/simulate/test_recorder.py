"""Recorded tensor operations: copies that the host waits for or not, values, and kernels."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lomo_ds.numerics.rounding import _clear_low_bits
from lomo_ds.simulate import Operation
from lomo_ds.simulate.program import HOST
from lomo_ds.simulate.recorder import Recorder
from lomo_ds.simulate.simulated_gpu import DEVICE
from lomo_ds.simulate.small_values import TensorsFromHost
from lomo_ds.simulate.streams import SimulatedStream, Streams

KILO = 2**10


@pytest.fixture
def streams() -> Iterator[Streams]:
    """Streams to which everything in the test is recorded."""
    streams = Streams()
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder(streams), TensorsFromHost(DEVICE):
        yield streams


def operations(streams: Streams) -> list[Operation]:
    return streams.program.operations


def names(streams: Streams) -> list[str]:
    return [operation.name for operation in operations(streams)]


def host_waits(streams: Streams) -> list[set[int]]:
    """Return the operations that each wait of the host waits for."""
    waits = [operation.waits for operation in operations(streams) if operation.stream == HOST]
    return [{wait.operation for wait in own} for own in waits]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("pinned", "non_blocking", "waits"),
    [(True, True, 0), (True, False, 1), (False, True, 1), (False, False, 1)],
)
def test_the_host_waits_for_copies_unless_they_are_asynchronous_and_of_pinned_memory(
    streams: Streams, pinned: bool, non_blocking: bool, waits: int
) -> None:
    host = torch.empty(KILO, pin_memory=pinned)
    on_gpu(KILO).copy_(host, non_blocking=non_blocking)
    host.copy_(on_gpu(KILO), non_blocking=non_blocking)
    copies = [operation.work for operation in operations(streams) if operation.work]
    assert [(work.up, work.down) for work in copies] == [(4 * KILO, 0), (0, 4 * KILO)]
    assert len(host_waits(streams)) == 2 * waits


def test_a_view_of_pinned_memory_is_pinned(streams: Streams) -> None:
    slab = torch.empty(KILO, pin_memory=True)
    on_gpu(KILO // 2).copy_(slab[: KILO // 2], non_blocking=True)
    assert slab[1:].is_pinned()
    assert not torch.empty(1).is_pinned()
    assert host_waits(streams) == []


def test_a_copy_in_a_stream_is_waited_for_there(streams: Streams) -> None:
    copies = SimulatedStream(streams, "copies")
    on_gpu(KILO).add_(1)
    with streams.use(copies):
        on_gpu(KILO).copy_(torch.empty(KILO))
    assert names(streams)[:2] == ["add_", "copy up"]
    assert operations(streams)[1].stream == copies.number
    assert host_waits(streams) == [{1}]


def test_the_host_waits_for_a_value(streams: Streams) -> None:
    count = on_gpu(3).zero_().sum()
    value = count.item()
    assert value == 0
    assert names(streams)[-2:] == ["read", "stream.synchronize"]
    assert host_waits(streams) == [{len(operations(streams)) - 2}]


def test_a_value_of_the_host_is_read_without_a_wait(streams: Streams) -> None:
    assert torch.arange(4).sum().item() == 6
    assert operations(streams) == []


def test_values_of_small_tensors_are_those_of_the_data(streams: Streams) -> None:
    lengths = torch.tensor([3, 1, 2], device=DEVICE)
    assert lengths.cumsum(0).max().item() == 6
    assert bool((lengths > 2).any())


def test_values_that_come_from_large_tensors_are_ones(streams: Streams) -> None:
    assert on_gpu(KILO, KILO).sum().item() == 1


def test_matrix_products_count_their_operations_and_bytes(streams: Streams) -> None:
    on_gpu(8, 4, dtype=torch.bfloat16) @ on_gpu(4, 16, dtype=torch.bfloat16)
    (product,) = operations(streams)
    assert product.work is not None
    assert (product.work.flops, product.work.memory) == (2 * 8 * 4 * 16, 2 * (8 * 4 + 4 * 16 + 8 * 16))


def test_views_and_allocations_are_no_kernels(streams: Streams) -> None:
    on_gpu(4, 4).view(16)[3:].detach()
    assert operations(streams) == []


def test_operations_of_autograd_are_marked(streams: Streams) -> None:
    weight = on_gpu(4, 4).requires_grad_()
    loss = (weight * weight).sum()
    forward = len(operations(streams))
    loss.backward(on_gpu())
    weight.detach().add_(1)
    marks = [operation.in_backward for operation in operations(streams)]
    assert marks == [False] * forward + [True] * (len(marks) - forward - 1) + [False]
    assert sum(marks) > 0


def test_an_operation_is_named_after_the_line_of_the_package_that_asks_for_it(streams: Streams) -> None:
    _clear_low_bits(on_gpu(4, dtype=torch.int32), on_gpu(4, dtype=torch.int32), 16)
    assert operations(streams) != []
    assert all(operation.source.startswith("lomo_ds/numerics/rounding.py:") for operation in operations(streams))
