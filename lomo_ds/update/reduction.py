"""Gradient reduction: reduce-scatters full gradients to this rank's shards, in buckets that overlap with backward."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import start_reduce_scatter
from lomo_ds.update.buckets import Buckets
from lomo_ds.update.gradient_parts import Parts, parts_of
from lomo_ds.update.target import Target

OnReduced = Callable[[list[Target], list[Tensor]], None]


@dataclass(frozen=True)
class _PendingReduceScatter:
    """A reduce-scatter in flight."""

    targets: tuple[Target, ...]
    parts: list[Parts]  # of each target's gradient
    shards: Tensor  # output: this rank's padded parts, concatenated
    full: Tensor  # input, which must stay alive until the collective ends
    work: Any


class Reduction:
    """Sums gradients, or projections of them, over the ranks and passes this rank's parts on, in one order everywhere.

    ``Buckets`` bounds the number of gradients that are alive. On one rank, gradients are passed on without a
    collective.

    Args:
        targets: all trained parameters.
        group: the ranks that parameters are partitioned over.
        dtype: the dtype gradients are reduced in; None keeps their own.
        on_reduced: receives targets and their gradient shards (1-D, see ``parts_of``), to keep or overwrite.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        group: ProcessGroup,
        dtype: torch.dtype | None,
        on_reduced: OnReduced,
    ) -> None:
        self.group = group
        self.dtype = dtype
        self.on_reduced = on_reduced
        self.world_size, self.rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        self.parts: dict[tuple[Target, int], Parts] = {}  # by target and elements of what is summed of it
        self.buckets: Buckets[tuple[Target, Tensor]] = Buckets(
            max(target.full_numel for target in targets), self.world_size, self._launch, self._limit_in_flight
        )
        self.reset()

    def add(self, target: Target, gradient: Tensor, in_flight_numel: int = 0) -> None:
        """Add the full gradient of a target, in any memory layout, or a projection of it with fewer columns.

        Order, shapes and dtypes must be equal on all ranks.

        Args:
            in_flight_numel: see ``Buckets.add``.
        """
        self.buckets.add((target, gradient), gradient.numel(), in_flight_numel)

    def flush(self) -> None:
        """Launch the last bucket, and pass on all remaining shards."""
        self.buckets.flush()

    def reset(self) -> None:
        """Drop all gradients that have not been passed on."""
        self.buckets.clear()
        self.in_flight: deque[_PendingReduceScatter] = deque()
        self.in_flight_numel = 0

    def _launch(self, bucket: list[tuple[Target, Tensor]]) -> None:
        """Start the reduction of one bucket, with one collective per dtype."""
        targets = [target for target, _ in bucket]
        flat = [gradient.reshape(-1) for _, gradient in bucket]
        bucket.clear()  # drops references, so that gradients do not outlive their converted or packed copies
        if self.dtype is not None:
            flat = [gradient.to(self.dtype) for gradient in flat]
        if self.world_size == 1:
            self.on_reduced(targets, flat)
            return
        for dtype in dict.fromkeys(gradient.dtype for gradient in flat):
            matching = [
                (target, gradient) for target, gradient in zip(targets, flat, strict=True) if gradient.dtype == dtype
            ]
            matching_targets, gradients = zip(*matching, strict=True)
            parts = [self._parts_of(target, gradient) for target, gradient in matching]
            self._reduce_scatter(matching_targets, parts, interleave(gradients, parts))

    def _parts_of(self, target: Target, gradient: Tensor) -> Parts:
        key = (target, gradient.numel())
        if key not in self.parts:
            self.parts[key] = parts_of(target, gradient.numel(), self.world_size)
        return self.parts[key]

    def _reduce_scatter(self, targets: tuple[Target, ...], parts: list[Parts], full: Tensor) -> None:
        shards = torch.empty(full.numel() // self.world_size, dtype=full.dtype, device=full.device)
        work = start_reduce_scatter(shards, full, self.group)
        self.in_flight.append(_PendingReduceScatter(targets, parts, shards, full, work))
        self.in_flight_numel += full.numel()

    def _limit_in_flight(self, max_numel: int) -> None:
        """Wait for the oldest reductions and pass their shards on, until at most ``max_numel`` elements are in flight.

        On CUDA only the current stream waits, so memory freed here can be reused by later work on that stream.
        """
        while self.in_flight and self.in_flight_numel > max_numel:
            pending = self.in_flight.popleft()
            self.in_flight_numel -= pending.full.numel()
            pending.work.wait()
            self.on_reduced(list(pending.targets), self._split_shards(pending))

    def _split_shards(self, pending: _PendingReduceScatter) -> list[Tensor]:
        """Split the output of a bucket into this rank's parts, without padding."""
        padded = pending.shards.split([parts.padded for parts in pending.parts])
        own = [parts.bounds[self.rank] for parts in pending.parts]
        return [part.narrow(0, 0, stop - start) for part, (start, stop) in zip(padded, own, strict=True)]


def interleave(gradients: Sequence[Tensor], parts: Sequence[Parts]) -> Tensor:
    """Pack flat gradients into one tensor for a reduce-scatter.

    The n-th part of the result, out of as many equal parts as there are ranks, holds the n-th rank's part of every
    gradient, padded with zeros.
    """
    rows = [of_gradient.as_rows(gradient) for gradient, of_gradient in zip(gradients, parts, strict=True)]
    return (torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]).view(-1)
