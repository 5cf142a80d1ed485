"""Tests of gathers through a wire format: one collective for each request, one dequantization for each matrix."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor

from lomo_ds import zero3
from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3 import transport
from lomo_ds.zero3.gathering import MAX_FETCH_EVENTS
from lomo_ds.zero3.wire import PlainWireFormat
from tests.engines import make_engine, my_part
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
MATRICES_OF_A_LAYER = 7


@contextmanager
def counting(owner: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of a function within the context."""
    calls: list[int] = []
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    with mock.patch.object(owner, name, counted):
        yield calls


def wired_engine(params: dict[str, Any], **zero: Any) -> Any:
    lean = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **lean, **zero}
    params = {"gather_granularity": "layer", **params}
    return make_engine(tiny_model(), "immediate", params=params, zero_optimization=zero)


def layer_is_gathered(params: dict[str, Any], zero: dict[str, Any], collectives_of_a_layer: int = 1) -> None:
    """All parameters of a decoder layer: matrices of other dtypes than the norms between them."""
    engine = wired_engine(params, **zero)
    names = [name for name, _ in engine.module.named_parameters() if name.startswith("model.layers.1.")]
    parameters = [engine.module.get_parameter(name) for name in names]
    whole: dict[str, Tensor] = {}
    for name, parameter in zip(names, parameters, strict=True):  # one at a time, exactly
        with zero3.gathered([parameter]):
            whole[name] = parameter.detach().clone()
    with counting(dist, "all_gather_into_tensor") as collectives, counting(int8, "dequantize") as decodes:
        handle = parameters[0].all_gather_coalesced(parameters)
        for _ in parameters:  # as DeepSpeed does
            handle.wait()
    assert len(collectives) == (collectives_of_a_layer if dist.get_world_size() > 1 else 0)
    assert len(decodes) == (MATRICES_OF_A_LAYER if params or "zero_quantized_weights" in zero else 0)
    for name, parameter in zip(names, parameters, strict=True):
        if "zero_quantized_weights" in zero:
            assert float((parameter - whole[name]).abs().max()) <= float(whole[name].abs().max()) / 127
        else:
            assert torch.equal(parameter, whole[name]), name
        padded = ceil_div(parameter.numel(), dist.get_world_size()) * dist.get_world_size()
        assert parameter.untyped_storage().nbytes() == padded * parameter.itemsize, "each is freed by itself"
        parameter.partition()


@pytest.mark.parametrize("world_size", [1, 2, 3])  # three divide no matrix
@pytest.mark.parametrize(
    ("params", "zero"),
    [
        ({"weights": "int8"}, {}),
        ({"weights": "int8"}, {"offload_param": {"device": "cpu"}}),
        ({}, {"offload_param": {"device": "cpu"}}),
    ],
    ids=["int8", "int8-host", "host"],
)
def test_a_layer_takes_one_collective_and_one_dequantization_for_each_matrix(
    ranks: GroupOf, world_size: int, params: dict[str, Any], zero: dict[str, Any]
) -> None:
    ranks(world_size).run(layer_is_gathered, params, zero)


def large_matrices_are_gathered(params: dict[str, Any], zero: dict[str, Any]) -> None:
    with mock.patch.object(transport, "ALONE_BYTES", 64):  # more than a norm has, less than a matrix
        layer_is_gathered(params, zero, MATRICES_OF_A_LAYER + 1)


@pytest.mark.parametrize("params", [{}, {"weights": "int8"}], ids=["floats", "int8"])
@pytest.mark.parametrize("zero", [{}, {"offload_param": {"device": "cpu"}}], ids=["device", "host"])
def test_a_large_matrix_is_gathered_on_its_own(ranks: GroupOf, params: dict[str, Any], zero: dict[str, Any]) -> None:
    ranks(2).run(large_matrices_are_gathered, params, zero)


def test_a_request_is_divided_into_large_shards_and_the_rest() -> None:
    small, large = 1000, transport.ALONE_BYTES
    assert transport.gather_batches([small, large, small, large]) == [[1], [3], [0, 2]]
    assert transport.gather_batches([small]) == [[0]]


def test_a_layer_that_is_quantized_for_the_gather_takes_one_collective(ranks: GroupOf) -> None:
    ranks(2).run(layer_is_gathered, {}, {"zero_quantized_weights": True})


def collectives_of_a_step(params: dict[str, Any]) -> tuple[int, int]:
    """All-gathers of the fourth step, as DeepSpeed traces the first ones; and how often it asked for parameters."""
    engine = wired_engine(params)
    batch = my_part(whole_batch(0, rows=2))
    for _ in range(3):
        engine.train_batch(batch)
    with counting(transport, "_GatherHandle") as arrivals, counting(dist, "all_gather_into_tensor") as collectives:
        engine.train_batch(batch)
    return len(collectives), len(arrivals)


def test_a_step_takes_one_collective_for_each_request(ranks: GroupOf) -> None:
    for collectives, asked in ranks(2).run(collectives_of_a_step, {"weights": "int8"}):
        assert 0 < collectives == asked < 2 * 2 * MATRICES_OF_A_LAYER


def test_shards_in_a_buffer_are_aligned_and_a_single_one_has_no_padding() -> None:
    assert transport.aligned_layout([10, 32, 1]) == ([slice(0, 10), slice(16, 48), slice(48, 49)], 64)
    assert transport.aligned_layout([10]) == ([slice(0, 10)], 10)


def a_gather_that_fails() -> None:
    engine = wired_engine({"weights": "int8"})
    parameters: list[Any] = list(engine.module.model.layers[0].parameters())
    handle = parameters[0].all_gather_coalesced(parameters)
    with mock.patch.object(int8, "dequantize", side_effect=MemoryError), pytest.raises(MemoryError):
        handle.wait()
    parameters = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
    assert len(parameters) >= MATRICES_OF_A_LAYER
    parameters[0].all_gather_coalesced(parameters).wait()
    assert all(parameter.ds_status.name == "AVAILABLE" for parameter in parameters)


def test_parameters_of_a_failed_gather_can_be_gathered_again(ranks: GroupOf) -> None:
    ranks(2).run(a_gather_that_fails)


class FakeEvent:
    """An event of a stream that never gets there by itself."""

    def __init__(self) -> None:
        self.waited_for = False

    def synchronize(self) -> None:
        self.waited_for = True


def test_lookahead_is_bounded_by_elements_not_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[FakeEvent] = []
    stream = SimpleNamespace(record_event=lambda: events.append(FakeEvent()) or events[-1])  # type: ignore[func-returns-value]
    fake = SimpleNamespace(is_synchronized_device=lambda: False, current_stream=lambda: stream)
    monkeypatch.setattr(transport, "get_accelerator", lambda: fake)
    backlog = transport._Backlog(limit_numel=100)

    def waited_for_when_asking(numel: int) -> list[int]:
        backlog.add(numel)
        waited_for = [number for number, event in enumerate(events) if event.waited_for]
        for event in events:
            event.waited_for = False
        return waited_for

    assert not any(waited_for_when_asking(5) for _ in range(20)), "20 small ones are no reason to wait"
    assert waited_for_when_asking(50) == [], "what is asked for now does not count"
    assert waited_for_when_asking(1000) == [10], "the first ten have been computed with when the eleventh is asked for"
    assert waited_for_when_asking(1) == [22], "what is larger than the limit has been computed with before the next"
    assert waited_for_when_asking(1) == []


def asked_for_ahead(params: dict[str, Any], zero: dict[str, Any]) -> tuple[int, int]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}
    engine = make_engine(tiny_model(), "immediate", params=params, zero_optimization=zero)
    bounds: list[Any] = []
    with mock.patch.object(transport._Backlog, "add", lambda backlog, numel: bounds.append(backlog.ahead)):
        engine.train_batch(my_part(whole_batch(0, rows=2)))
    gathering: Any = engine.optimizer.gathering
    coordinator = gathering.offload.get_param_coordinator()
    return sum(bound is not None for bound in bounds), getattr(coordinator, MAX_FETCH_EVENTS)


@pytest.mark.parametrize(
    ("params", "zero", "bounded"),
    [
        ({}, {}, False),
        ({"weights": "int8"}, {}, False),
        ({}, {"overlap_comm": True}, True),
        ({"weights": "int8"}, {"overlap_comm": True}, True),
        ({}, {"offload_param": {"device": "cpu"}}, True),
    ],
    ids=["DeepSpeed's gathers", "over a wire", "DeepSpeed's, overlapping", "over a wire, overlapping", "offload"],
)
def test_elements_bound_the_lookahead_of_a_separate_stream_in_place_of_deepspeeds_events(
    ranks: GroupOf, params: dict[str, Any], zero: dict[str, Any], bounded: bool
) -> None:
    for asked, most_events in ranks(2).run(asked_for_ahead, params, zero):
        assert asked > 5 if bounded else asked == 0
        assert most_events == sys.maxsize


@pytest.mark.parametrize("numel", [1, 3])
def test_a_parameter_cut_from_a_shared_buffer_is_a_separate_tensor(numel: int) -> None:
    buffer = torch.arange(2 * 8.0).view(2, 8)  # a row for each rank
    whole = PlainWireFormat(torch.device("cpu")).unpack(buffer[:, 2 : 2 + numel], numel, torch.float32)
    assert whole.tolist() == [*range(2, 2 + numel), *range(10, 10 + numel)]
    assert whole.is_contiguous()
    assert whole.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
