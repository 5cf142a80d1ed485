"""From whole gradients to this rank's shards of their sum: a bucket at a time, while backward goes on."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.update.buckets import Buckets

Deliver = Callable[[list[int], list[Tensor]], None]


@dataclass(frozen=True)
class _Flight:
    """A reduce-scatter under way."""

    indices: tuple[int, ...]
    shards: Tensor  # what it writes: padded shards behind one another
    whole: Tensor  # what it reads, which must live as long
    work: Any


class Reduction:
    """Sums the gradients of all ranks, and delivers each rank its shards, in an order that all ranks share.

    ``Buckets`` bounds how many are alive. On one rank there is nothing to sum, and shards are the gradients themselves.

    Args:
        numels: of each whole parameter.
        shard_numels: of this rank's part of each, without padding.
        group: the ranks that parameters are split over.
        dtype: what gradients are summed in; None keeps their own.
        deliver: is given parameters' indices and their gradient shards (1-D, to be kept or clobbered).
    """

    def __init__(
        self,
        numels: list[int],
        shard_numels: list[int],
        group: ProcessGroup,
        dtype: torch.dtype | None,
        deliver: Deliver,
    ) -> None:
        self.numels = numels
        self.shard_numels = shard_numels
        self.group = group
        self.dtype = dtype
        self.deliver = deliver
        self.world_size = dist.get_world_size(group)
        self.buckets: Buckets[tuple[int, Tensor]] = Buckets(max(numels), self.world_size, self._launch, self._land)
        self.forget()

    def add(self, index: int, gradient: Tensor) -> None:
        """Take the whole gradient of parameter ``index``; any shape, the same order and dtypes on all ranks."""
        self.buckets.add((index, gradient), self.numels[index])

    def flush(self) -> None:
        """Deliver all that is left."""
        self.buckets.flush()

    def forget(self) -> None:
        """Drop what has not been delivered."""
        self.buckets.forget()
        self.in_flight: deque[_Flight] = deque()
        self.in_flight_numel = 0

    def _launch(self, bucket: list[tuple[int, Tensor]]) -> None:
        """Send off what has waited together; gradients of several dtypes by themselves."""
        indices = [index for index, _ in bucket]
        flat = [gradient.reshape(-1) for _, gradient in bucket]
        bucket.clear()  # a gradient that is converted or packed below does not live beside its copy
        if self.dtype is not None:
            flat = [gradient.to(self.dtype) for gradient in flat]
        if self.world_size == 1:
            self.deliver(indices, flat)
            return
        for dtype in dict.fromkeys(gradient.dtype for gradient in flat):
            alike = [
                (index, gradient) for index, gradient in zip(indices, flat, strict=True) if gradient.dtype == dtype
            ]
            some, theirs = zip(*alike, strict=True)
            self._reduce_scatter(some, interleave(theirs, self.world_size))

    def _reduce_scatter(self, indices: tuple[int, ...], whole: Tensor) -> None:
        shards = torch.empty(whole.numel() // self.world_size, dtype=whole.dtype, device=whole.device)
        work = dist.reduce_scatter_tensor(shards, whole, group=self.group, async_op=True)
        self.in_flight.append(_Flight(indices, shards, whole, work))
        self.in_flight_numel += whole.numel()

    def _land(self, until: int) -> None:
        """Deliver the oldest until at most ``until`` elements are in flight.

        On CUDA to wait is the stream's business: what is freed here may be used again by what runs behind it.
        """
        while self.in_flight and self.in_flight_numel > until:
            flight = self.in_flight.popleft()
            self.in_flight_numel -= flight.whole.numel()
            flight.work.wait()
            self.deliver(list(flight.indices), self._cut(flight))

    def _cut(self, flight: _Flight) -> list[Tensor]:
        """The shards of a bucket, without their padding."""
        padded = [-(-self.numels[index] // self.world_size) for index in flight.indices]
        return [
            shard.narrow(0, 0, self.shard_numels[index])
            for index, shard in zip(flight.indices, flight.shards.split(padded), strict=True)
        ]


def interleave(gradients: Sequence[Tensor], world_size: int) -> Tensor:
    """Flat gradients as one, whose n-th part holds the n-th part of each, zero-padded to ceil(numel / world size)."""
    parts = []
    for gradient in gradients:
        padding = -gradient.numel() % world_size
        padded = torch.nn.functional.pad(gradient, (0, padding)) if padding else gradient
        parts.append(padded.view(world_size, -1))
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).view(-1)
