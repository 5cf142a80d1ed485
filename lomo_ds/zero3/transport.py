"""Replacement for DeepSpeed's gathering, for shards that are not on the device in the dtype of the parameter.

DeepSpeed's hooks still decide which parameters are gathered, when, and in which stream. DeepSpeed's own gathering
blocks the host on each copy from host memory and quantizes with its own kernels. Here a ``WireFormat`` encodes each
shard, and all parameters of one request travel in one all-gather.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Module

from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.lookahead import LookaheadLimit
from lomo_ds.zero3.shard import Partitioned, Shard, slot_of

ALIGNMENT = 16  # bytes, of each shard in the buffer that several are sent in: the widest load of a GPU
REPLACED = ("all_gather_coalesced", "all_gather", "partition")  # methods that DeepSpeed gives a parameter


class WireFormat(Protocol):
    """How a shard, which has its padding and lies where it is kept, comes to the device that computes."""

    def pack(self, shard: Tensor) -> Tensor:
        """The shard on the device, 1-D, where one rank has all of them and sends nothing."""
        ...

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Elements and dtype that a shard of so many elements, kept as ``dtype``, is sent as; alike on all ranks."""
        ...

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """Write what this rank sends into ``packed``: 1-D, on the device, as ``packed_as`` says."""
        ...

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The shards of all ranks behind one another, 1-D, with their padding.

        Args:
            packed: what each rank has sent, ranks x length; rows may lie apart.
            numel: of a shard with its padding.
        """
        ...


def install_gathering(
    model: Module, wire: WireFormat, exact: WireFormat, ahead_numel: int | None
) -> Callable[[], None]:
    """Let the parameters of ``model``, which have been split, be gathered by ``wire``; returns what undoes it.

    Args:
        exact: what brings them to ``gathered`` and ``GatheredParameters``, which read or write the model itself.
        ahead_numel: elements of whole parameters that may be asked for before others have been computed with; None
            where they are asked for in the computing stream.
    """
    backlog = _Backlog(ahead_numel)

    def gather(parameters: Sequence[Partitioned], safe_mode: bool = False, quantize: bool = False) -> "_GatherHandle":
        backlog.add(sum(parameter.ds_numel for parameter in parameters))
        in_order = sorted(parameters, key=lambda p: p.ds_id)
        _expect_reads(in_order)
        return _GatherHandle(in_order, wire)

    def gather_now(parameter: Partitioned, param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        assert not async_op
        some = [parameter] if param_list is None else param_list
        for one in some:
            if wire is not exact and one.ds_status is ZeroParamStatus.AVAILABLE:
                one.partition()
        missing = [one for one in some if one.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        _GatherHandle(missing, exact).wait()

    partitioned: list[Partitioned] = list(model.parameters())
    undo = _restoring(partitioned)
    for parameter in partitioned:
        parameter.all_gather_coalesced = gather
        parameter.all_gather = partial(gather_now, parameter)
        parameter.partition = partial(_partition, parameter, parameter.partition)
    return undo


def limit_gathering(model: Module, ahead_numel: int) -> Callable[[], None]:
    """Let DeepSpeed's own gathering ask for no more ahead than ``install_gathering`` does; returns what undoes it."""
    backlog = _Backlog(ahead_numel)

    def gather(own: Callable[..., Any], parameters: Iterable[Partitioned], **options: bool) -> Any:
        wanted = list(parameters)
        backlog.add(sum(parameter.ds_numel for parameter in wanted))
        return own(wanted, **options)

    partitioned: list[Partitioned] = list(model.parameters())
    undo = _restoring(partitioned)
    for parameter in partitioned:
        parameter.all_gather_coalesced = partial(gather, parameter.all_gather_coalesced)
    return undo


def reset_unregistered_gathers(model: Module) -> None:
    """Let parameters be asked for again that an exception kept from DeepSpeed's registry of those on their way."""
    registered: Any = model
    for parameter in registered.parameters():
        unregistered = parameter not in registered.ds_inflight_param_registry
        if parameter.ds_status is ZeroParamStatus.INFLIGHT and unregistered:
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _restoring(parameters: list[Partitioned]) -> Callable[[], None]:
    """What gives the parameters the methods back that they have now."""
    methods = [{name: getattr(parameter, name) for name in REPLACED} for parameter in parameters]

    def undo() -> None:
        for parameter, before in zip(parameters, methods, strict=True):
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
            shard.storage.copy_(int8.quantize_flat(padded))
        else:
            shard.write(values)
    if has_been_updated:
        get_accelerator().synchronize()  # DeepSpeed gathers on a stream that waits for no other
    release(some, hierarchy, False, free_data)


class _Backlog:
    """Lets the host wait when it asks for parameters long before they are computed with, in place of DeepSpeed's limit.

    See ``LookaheadLimit``.
    """

    def __init__(self, limit_numel: int | None) -> None:
        self.ahead = None if limit_numel is None else LookaheadLimit(limit_numel)
        self.events: deque[Any] = deque()  # in the computing stream, of the latest asks
        accelerator = get_accelerator()
        self.computing = None if accelerator.is_synchronized_device() else accelerator.current_stream()

    def add(self, numel: int) -> None:
        """So much is asked for."""
        if self.computing is None or self.ahead is None:
            return
        self.events.append(self.computing.record_event())
        number = self.ahead.request(numel)
        if number is not None:
            place = len(self.events) - (self.ahead.request_count - number)
            self.events[place].synchronize()
            for _ in range(place + 1):
                self.events.popleft()


def _expect_reads(parameters: list[Partitioned]) -> None:
    places = [place for place in map(slot_of, parameters) if place is not None]
    if places:
        places[0].space.expect(places)


def _kept(parameter: Partitioned) -> Tensor:
    """This rank's shard with its padding, read if it lies in a file."""
    place = slot_of(parameter)
    return parameter.ds_tensor.data if place is None else place.read(place.numel, place.space.device)


def _all_gather(parameters: Sequence[Partitioned], wire: WireFormat) -> tuple[list[Tensor], Any]:
    """Send the shards of several parameters in one buffer; what every rank sends of each, and the collective.

    A rank's row of the buffer has its shard of each parameter, of whatever dtype, and is gathered in place.

    Returns:
        Views of the buffer, ranks x length, to be read when the collective has been waited for.
    """
    group = parameters[0].ds_process_group
    packed_as = [wire.packed_as(*_kept_as(parameter)) for parameter in parameters]
    spans, row_bytes = aligned_layout([numel * dtype.itemsize for numel, dtype in packed_as])
    device = get_accelerator().current_device_name()
    buffer = torch.empty(dist.get_world_size(group), row_bytes, dtype=torch.uint8, device=device)
    views = [buffer[:, span].view(dtype) for span, (_, dtype) in zip(spans, packed_as, strict=True)]
    rank = dist.get_rank(group)
    for parameter, view in zip(parameters, views, strict=True):
        wire.pack_into(view[rank], _kept(parameter))
    return views, dist.all_gather_into_tensor(buffer.view(-1), buffer[rank], group=group, async_op=True)


def _kept_as(parameter: Partitioned) -> tuple[int, torch.dtype]:
    """Elements of this rank's shard with its padding, and their dtype; of eight-bit weights, of their buffer."""
    place = slot_of(parameter)
    if place is not None:
        return place.numel, place.dtype
    return parameter.ds_tensor.numel(), parameter.ds_tensor.dtype


def aligned_layout(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Where things of these sizes lie behind one another, each aligned; and the bytes of all. One alone has no gap."""
    if len(sizes) == 1:
        return [slice(0, sizes[0])], sizes[0]
    aligned = [ceil_div(size, ALIGNMENT) * ALIGNMENT for size in sizes]
    starts = itertools.accumulate(aligned, initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)], sum(aligned)


class _GatherHandle:
    """Parameters that are gathered together; DeepSpeed waits for it once for each, and from several threads.

    Each becomes a tensor of its own, as each is freed by itself: cut from the buffer, one that is still in use would
    keep the bytes of all. Only a parameter that was gathered alone, and not in eight bits, stays where it was received.
    """

    def __init__(self, parameters: Sequence[Partitioned], wire: WireFormat) -> None:
        assert all(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in parameters)
        self.wire = wire
        self.lock = threading.Lock()
        self.work: Any = None
        packed: list[Tensor] = []
        if parameters and dist.get_world_size(parameters[0].ds_process_group) == 1:
            packed = [wire.pack(_kept(parameter)).view(1, -1) for parameter in parameters]
        elif parameters:
            packed, self.work = _all_gather(parameters, wire)
        self.pending = deque(zip(parameters, packed, strict=True))
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **options: Any) -> None:
        """Every parameter of it is whole for what the current stream does next."""
        with self.lock:
            try:
                if self.work is not None:
                    self.work.wait()
                    self.work = None
                while self.pending:
                    self._open(*self.pending[0])
                    self.pending.popleft()
            except BaseException:
                while self.pending:  # they can be asked for again
                    self.pending.popleft()[0].ds_status = ZeroParamStatus.NOT_AVAILABLE
                raise

    def _open(self, parameter: Partitioned, packed: Tensor) -> None:
        """Give the parameter its values."""
        flat = self.wire.unpack(packed, parameter.ds_tensor.ds_numel, parameter.dtype)
        parameter.data = flat[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
