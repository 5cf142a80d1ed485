"""Gathering that takes the place of DeepSpeed's, for shards that do not lie ready on the device in their own dtype.

DeepSpeed's hooks still say which parameters are needed when, and in which stream. Theirs lets the host wait for each
copy from host memory, and quantizes with kernels of its own; here a shard travels as a ``Wire`` makes it.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Module

from lomo_ds import int8
from lomo_ds.zero3.shard import Partitioned, Shard, place_of

REPLACED = ("all_gather_coalesced", "all_gather", "partition")  # methods that DeepSpeed gives a parameter


class Wire(Protocol):
    """How a shard travels from rank to rank."""

    def pack(self, shard: Tensor) -> Tensor:
        """What this rank sends: 1-D, on the device that computes, as long on every rank.

        Args:
            shard: with its padding, where it is kept.
        """
        ...

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The shards of all ranks behind one another, 1-D, with their padding.

        Args:
            packed: what each rank has sent, ranks x length.
            numel: of a shard with its padding.
        """
        ...


def gather_by(model: Module, wire: Wire, exact: Wire, ahead_numel: int) -> Callable[[], None]:
    """Let the parameters of ``model``, which have been split, be gathered by ``wire``; returns what undoes it.

    Args:
        exact: what brings them to ``gathered`` and ``GatheredParameters``, which read or write the model itself.
        ahead_numel: elements of whole parameters that may be asked for before they are computed with.
    """
    backlog = _Backlog(ahead_numel)

    def gather(parameters: Sequence[Partitioned], safe_mode: bool = False, quantize: bool = False) -> "_Arrival":
        backlog.add(sum(parameter.ds_numel for parameter in parameters))
        in_order = sorted(parameters, key=lambda p: p.ds_id)
        _expect_reads(in_order)
        return _Arrival(in_order, wire)

    def gather_now(parameter: Partitioned, param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        assert not async_op
        some = [parameter] if param_list is None else param_list
        for one in some:
            if wire is not exact and one.ds_status is ZeroParamStatus.AVAILABLE:
                one.partition()
        missing = [one for one in some if one.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        _Arrival(missing, exact).wait()

    partitioned: list[Partitioned] = list(model.parameters())
    theirs = [{name: getattr(parameter, name) for name in REPLACED} for parameter in partitioned]
    for parameter in partitioned:
        parameter.all_gather_coalesced = gather
        parameter.all_gather = partial(gather_now, parameter)
        parameter.partition = partial(_partition, parameter, parameter.partition)

    def undo() -> None:
        for parameter, before in zip(partitioned, theirs, strict=True):
            for name, method in before.items():
                setattr(parameter, name, method)

    return undo


def _partition(
    parameter: Partitioned,
    release: Callable[..., None],
    param_list: Any = None,
    hierarchy: int = 0,
    has_been_updated: bool = False,
    free_data: bool = True,
) -> None:
    """DeepSpeed's ``partition``, which knows neither eight-bit weights nor files, for what a user has written."""
    some = [parameter] if param_list is None else param_list
    for one in some if has_been_updated else ():
        shard = Shard.of("", one)
        values = one.data.reshape(-1)[shard.start : shard.stop]
        if shard.data.dtype == torch.int8:
            padded = torch.nn.functional.pad(values, (0, one.ds_tensor.ds_numel - values.numel()))
            shard.kept.copy_(int8.buffer_of(padded))
        else:
            shard.write(values)
    if has_been_updated:
        get_accelerator().synchronize()  # DeepSpeed gathers on a stream that waits for no other
    release(some, hierarchy, False, free_data)


class _Backlog:
    """Lets the host wait when it asks for parameters long before they are computed with.

    To ask takes memory at once, and what was released gives its memory back no sooner than the device has computed
    with it: a host that is far ahead would fill the device with layers to come.
    """

    def __init__(self, limit_numel: int) -> None:
        self.limit_numel = limit_numel
        self.asked: deque[tuple[Any, int]] = deque()  # an event in the computing stream, and what was asked for then
        self.asked_numel = 0
        accelerator = get_accelerator()
        self.computing = None if accelerator.is_synchronized_device() else accelerator.current_stream()

    def add(self, numel: int) -> None:
        """So much is asked for."""
        if self.computing is None:
            return
        self.asked.append((self.computing.record_event(), numel))
        self.asked_numel += numel
        while self.asked_numel > self.limit_numel and len(self.asked) > 1:
            computed, earlier_numel = self.asked.popleft()
            computed.synchronize()
            self.asked_numel -= earlier_numel


def _expect_reads(parameters: list[Partitioned]) -> None:
    places = [place for place in map(place_of, parameters) if place is not None]
    if places:
        places[0].space.expect(places)


class _Parcel:
    """One parameter on its way."""

    def __init__(self, parameter: Partitioned, wire: Wire) -> None:
        assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        self.parameter = parameter
        self.wire = wire
        group = parameter.ds_process_group
        world_size = dist.get_world_size(group)
        place = place_of(parameter)
        partition = parameter.ds_tensor.data if place is None else place.read(place.numel, place.space.device)
        mine = wire.pack(partition)
        self.work: Any = None
        if world_size == 1:
            self.packed = mine.view(1, -1)
        else:
            self.packed = torch.empty(world_size, mine.numel(), dtype=mine.dtype, device=mine.device)
            self.work = dist.all_gather_into_tensor(self.packed.view(-1), mine, group=group, async_op=True)
            self.mine = mine  # which must live until it has been sent
        parameter.ds_status = ZeroParamStatus.INFLIGHT

    def forget(self) -> None:
        """It does not come."""
        self.parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def open(self) -> None:
        """Give the parameter its values."""
        if self.work is not None:
            self.work.wait()
        parameter = self.parameter
        flat = self.wire.unpack(self.packed, parameter.ds_tensor.ds_numel, parameter.dtype)
        parameter.data = flat[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE


class _Arrival:
    """Of parameters that are gathered together; DeepSpeed asks for it once for each, and from several threads."""

    def __init__(self, parameters: Sequence[Partitioned], wire: Wire) -> None:
        self.parcels: deque[_Parcel] = deque()
        self.lock = threading.Lock()
        with self._forgetting():
            for parameter in parameters:
                self.parcels.append(_Parcel(parameter, wire))

    def wait(self, **options: Any) -> None:
        """Every parameter of it is whole for what the current stream does next."""
        with self.lock, self._forgetting():
            while self.parcels:
                self.parcels[0].open()
                self.parcels.popleft()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Where one fails, the others can be asked for again."""
        try:
            yield
        except BaseException:
            while self.parcels:
                self.parcels.popleft().forget()
            raise
