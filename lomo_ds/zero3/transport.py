"""Replacement for DeepSpeed's gathering of parameters.

DeepSpeed's hooks still decide which parameters are gathered, and when. DeepSpeed's own gathering blocks the host on
each copy from host memory, quantizes with its own kernels, copies each parameter out of a receive buffer, and lets a
module wait for everything that has been requested so far, prefetched layers included. Here a ``WireFormat`` encodes
each shard. A large shard is received where its parameter will be; the small ones of a request share one all-gather. A
module waits for its own parameters.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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

ALIGNMENT = 16  # bytes, of each shard in a shared buffer: the widest load of a GPU
# A shard with at least so many bytes is gathered on its own, since moving it takes much longer than starting to
ALONE_BYTES = 2**20
REPLACED = ("all_gather_coalesced", "all_gather", "partition")  # methods that DeepSpeed adds to a parameter


class WireFormat(Protocol):
    """Encoding of a stored shard, with its padding, for the gather on the compute device."""

    def pack(self, shard: Tensor) -> Tensor:
        """Return the shard on the device, 1-D; used with a single rank, which sends nothing."""
        ...

    def packed_as(self, numel: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Return elements and dtype of an encoded shard with ``numel`` elements of ``dtype``; equal on all ranks."""
        ...

    def pack_into(self, packed: Tensor, shard: Tensor) -> None:
        """Encode this rank's shard into ``packed``: 1-D, on the device, with the size and dtype of ``packed_as``."""
        ...

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Decode the shards of all ranks into one 1-D tensor, with their padding.

        Args:
            packed: encoded shards, ranks x length; rows may have gaps between them.
            numel: elements of a shard with its padding.
        """
        ...


def install_gathering(
    model: Module, wire: WireFormat, exact: WireFormat, ahead_numel: int | None
) -> Callable[[], None]:
    """Make the partitioned parameters of ``model`` gather through ``wire``; return a function that undoes it.

    Args:
        exact: lossless format for ``gathered`` and ``GatheredParameters``, which read or write the model itself.
        ahead_numel: elements of full parameters that may be requested before the device has used earlier ones; None
            if gathers run in the compute stream.
    """
    backlog = _Backlog(ahead_numel)
    accelerator = get_accelerator()
    has_own_stream = ahead_numel is not None and not accelerator.is_synchronized_device()
    stream = accelerator.Stream() if has_own_stream else None

    def gather(parameters: Sequence[Partitioned], safe_mode: bool = False, quantize: bool = False) -> "_GatherHandle":
        backlog.add(sum(parameter.ds_numel for parameter in parameters))
        in_order = sorted(parameters, key=lambda p: p.ds_id)
        _expect_reads(in_order)
        with nullcontext() if stream is None else accelerator.stream(stream):
            return _GatherHandle(in_order, wire, stream)

    def gather_now(parameter: Partitioned, param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        assert not async_op
        requested = [parameter] if param_list is None else param_list
        for param in requested:
            if wire is not exact and param.ds_status is ZeroParamStatus.AVAILABLE:
                param.partition()
        missing = [param for param in requested if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        _GatherHandle(missing, exact).wait()

    partitioned: list[Partitioned] = list(model.parameters())
    undo = _restoring(partitioned)
    for parameter in partitioned:
        parameter.all_gather_coalesced = gather
        parameter.all_gather = partial(gather_now, parameter)
        parameter.partition = partial(_partition, parameter, parameter.partition)
    return undo


def reset_unregistered_gathers(model: Module) -> None:
    """Reset parameters in flight that an exception kept out of DeepSpeed's registry, so they can be gathered again."""
    registered: Any = model
    for parameter in registered.parameters():
        unregistered = parameter not in registered.ds_inflight_param_registry
        if parameter.ds_status is ZeroParamStatus.INFLIGHT and unregistered:
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _restoring(parameters: list[Partitioned]) -> Callable[[], None]:
    """Return a function that restores the current methods of the parameters."""
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
    """Partition parameters like DeepSpeed, and write a user's changes back to eight-bit weights and NVMe as well."""
    requested = [parameter] if param_list is None else param_list
    for param in requested if has_been_updated else ():
        shard = Shard.of("", param)
        values = param.data.reshape(-1)[shard.start : shard.stop]
        if shard.data.dtype == torch.int8:
            padded = torch.nn.functional.pad(values, (0, param.ds_tensor.ds_numel - values.numel()))
            shard.storage.copy_(int8.quantize_flat(padded))
        else:
            shard.write(values)
    if has_been_updated:
        get_accelerator().synchronize()  # DeepSpeed gathers on a stream that does not wait for this one
    release(requested, hierarchy, False, free_data)


class _Backlog:
    """Blocks the host while it is too far ahead of the device; replaces DeepSpeed's limit. See ``LookaheadLimit``."""

    def __init__(self, limit_numel: int | None) -> None:
        self.ahead = None if limit_numel is None else LookaheadLimit(limit_numel)
        self.events: deque[Any] = deque()  # events in the compute stream, one for each recent request
        accelerator = get_accelerator()
        self.compute_stream = None if accelerator.is_synchronized_device() else accelerator.current_stream()

    def add(self, numel: int) -> None:
        """Register a request for ``numel`` elements, and wait if the limit is exceeded."""
        if self.compute_stream is None or self.ahead is None:
            return
        self.events.append(self.compute_stream.record_event())
        number = self.ahead.request(numel)
        if number is not None:
            position = len(self.events) - (self.ahead.request_count - number)
            self.events[position].synchronize()
            for _ in range(position + 1):
                self.events.popleft()


def _expect_reads(parameters: list[Partitioned]) -> None:
    slots = [slot for slot in map(slot_of, parameters) if slot is not None]
    if slots:
        slots[0].space.expect(slots)


def _stored(parameter: Partitioned) -> Tensor:
    """Return this rank's shard with its padding, read from NVMe if necessary."""
    slot = slot_of(parameter)
    return parameter.ds_tensor.data if slot is None else slot.read(slot.numel, slot.space.device)


def gather_batches(sizes: Sequence[int]) -> list[list[int]]:
    """Divide a request into collectives: return the positions of the shards that travel together.

    Args:
        sizes: bytes of each encoded shard.
    """
    alone = [[position] for position, size in enumerate(sizes) if size >= ALONE_BYTES]
    together = [position for position, size in enumerate(sizes) if size < ALONE_BYTES]
    return [*alone, *([together] if together else [])]


def _all_gather(parameters: Sequence[Partitioned], wire: WireFormat) -> tuple[list[Tensor], Any]:
    """Start one all-gather of the shards of several parameters.

    The row of a rank in the buffer holds its shard of each parameter, of any dtype, and is gathered in place.

    Returns:
        For each parameter a view of the buffer, ranks x length, which is valid after the collective; and its handle.
    """
    group = parameters[0].ds_process_group
    packed_as = [wire.packed_as(*_stored_as(parameter)) for parameter in parameters]
    spans, row_bytes = aligned_layout([numel * dtype.itemsize for numel, dtype in packed_as])
    device = get_accelerator().current_device_name()
    buffer = torch.empty(dist.get_world_size(group), row_bytes, dtype=torch.uint8, device=device)
    views = [buffer[:, span].view(dtype) for span, (_, dtype) in zip(spans, packed_as, strict=True)]
    rank = dist.get_rank(group)
    for parameter, view in zip(parameters, views, strict=True):
        wire.pack_into(view[rank], _stored(parameter))
    return views, dist.all_gather_into_tensor(buffer.view(-1), buffer[rank], group=group, async_op=True)


def _stored_as(parameter: Partitioned) -> tuple[int, torch.dtype]:
    """Return elements and dtype of this rank's stored shard: with padding, or of the buffer of eight-bit weights."""
    slot = slot_of(parameter)
    if slot is not None:
        return slot.numel, slot.dtype
    return parameter.ds_tensor.numel(), parameter.ds_tensor.dtype


def aligned_layout(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Return the aligned ranges of consecutive items, and the total bytes; a single item is not padded."""
    if len(sizes) == 1:
        return [slice(0, sizes[0])], sizes[0]
    aligned = [ceil_div(size, ALIGNMENT) * ALIGNMENT for size in sizes]
    starts = itertools.accumulate(aligned, initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)], sum(aligned)


class _GatherHandle:
    """Handle of one request for several parameters; DeepSpeed waits for it once per parameter, from several threads.

    Each parameter becomes a separate tensor, since each is freed separately: a view of the buffer would keep the whole
    buffer alive. Only a parameter that was gathered alone, and not in eight bits, remains a view of it.

    Args:
        stream: the current stream, if it is not the one that computes.

    Attributes:
        pending: collectives in flight, each with its handle (None for a single rank), and its parameters with their
            encoded shards.
    """

    def __init__(self, parameters: Sequence[Partitioned], wire: WireFormat, stream: Any = None) -> None:
        assert all(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in parameters)
        self.wire = wire
        self.lock = threading.Lock()
        self.pending: deque[tuple[Any, deque[tuple[Partitioned, Tensor]]]] = deque()
        if parameters and dist.get_world_size(parameters[0].ds_process_group) == 1:
            packed = [wire.pack(_stored(parameter)).view(1, -1) for parameter in parameters]
            self.pending.append((None, deque(zip(parameters, packed, strict=True))))
        elif parameters:
            for batch in self._batches(parameters):
                packed, work = _all_gather(batch, wire)
                self.pending.append((work, deque(zip(batch, packed, strict=True))))
        self.copied = None if stream is None else stream.record_event()
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **options: Any) -> None:
        """Make every parameter of the gather available to the current stream."""
        with self.lock:
            try:
                if self.pending and self.copied is not None:
                    get_accelerator().current_stream().wait_event(self.copied)
                while self.pending:
                    work, arrived = self.pending[0]
                    if work is not None:
                        work.wait()
                    while arrived:
                        self._unpack(*arrived[0])
                        arrived.popleft()
                    self.pending.popleft()
            except BaseException:
                for parameter, _ in (entry for _, batch in self.pending for entry in batch):
                    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # so that they can be gathered again
                self.pending.clear()
                raise

    def _batches(self, parameters: Sequence[Partitioned]) -> list[list[Partitioned]]:
        packed_as = [self.wire.packed_as(*_stored_as(parameter)) for parameter in parameters]
        batches = gather_batches([numel * dtype.itemsize for numel, dtype in packed_as])
        return [[parameters[position] for position in batch] for batch in batches]

    def _unpack(self, parameter: Partitioned, packed: Tensor) -> None:
        """Decode the values of a parameter."""
        flat = self.wire.unpack(packed, parameter.ds_tensor.ds_numel, parameter.dtype)
        if self.copied is not None:  # memory of another stream, which must not use it again before this one has
            packed.record_stream(get_accelerator().current_stream())
        parameter.data = flat[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
