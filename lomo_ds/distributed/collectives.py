"""Collectives for small values: sums, minima, objects and errors of all ranks.

Tensors go through ``deepspeed.comm``, so that DeepSpeed's communication logger counts them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.errors import LomoError, PeerError

Result = TypeVar("Result")


def all_reduce_sum(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum ``values`` over all ranks in place, so that every rank makes the same decision."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def all_reduce_min(values: Tensor, group: ProcessGroup) -> Tensor:
    """Replace each value by its minimum over all ranks, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=group)
    return values


def start_reduce_scatter(shards: Tensor, full: Tensor, group: ProcessGroup) -> Any:
    """Start to sum ``full`` over all ranks, of which each receives its part in ``shards``; return the handle."""
    return dist.reduce_scatter_tensor(shards, full, group=group, async_op=True)


def start_all_reduce(values: Tensor, group: ProcessGroup) -> Any:
    """Start to sum ``values`` over all ranks in place; return the handle."""
    return dist.all_reduce(values, group=group, async_op=True)


def raise_on_all_ranks(action: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """Run ``action`` on every rank; if it fails on any rank, raise on all: only the lowest failing rank reports.

    Raises:
        LomoError: the error of this rank's ``action``, if no lower rank failed.
        PeerError: another rank reports the error.
    """
    outcome: Result | LomoError
    try:
        outcome = action()
    except LomoError as error:
        outcome = error
    failures = gather_objects(str(outcome) if isinstance(outcome, LomoError) else None, group)
    first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
    if first is None:
        assert not isinstance(outcome, LomoError)
        return outcome
    if first == torch.distributed.get_rank(group):
        assert isinstance(outcome, LomoError)
        outcome.only_on_this_rank = True
        raise outcome
    raise PeerError(failures[first])


def gather_objects(value: Result, group: ProcessGroup | None = None) -> list[Result]:
    """Return the ``value`` of every rank, in rank order; values must be small and picklable."""
    if torch.distributed.get_world_size(group) == 1:
        return [value]  # avoid the first collective, which would create a communicator: that takes time and GPU memory
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
