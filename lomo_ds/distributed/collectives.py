"""The collectives this project uses, each with one meaning.

All go through ``deepspeed.comm``, so DeepSpeed's communication logger counts them with its own.
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
    """Sum ``values`` over all ranks, in place, so that every rank decides on the same figures."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def all_reduce_min(values: Tensor, group: ProcessGroup) -> Tensor:
    """The smallest of each value over all ranks, in place: what every rank can rely on."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=group)
    return values


def raise_on_all_ranks(action: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """Run ``action`` on every rank; if it fails on any, all stop: the first that knows raises, the others are silent.

    Raises:
        LomoError: what this rank's ``action`` raised, if no lower rank failed too.
        PeerError: another rank failed first.
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
    """``value`` of every rank, on every rank; any small object that pickles."""
    if torch.distributed.get_world_size(group) == 1:
        return [value]  # the first collective would build a communicator, which takes time and GPU memory
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return found
