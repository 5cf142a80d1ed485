"""The hooks in the backward pass: one parameter's gradient from autograd to the schedule, and gone."""

from functools import partial

import torch
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lomo_ds.distributed import reduce_scatter_shard
from lomo_ds.errors import ConfigError
from lomo_ds.schedules import Schedule
from lomo_ds.zero3 import Shard


class BackwardHooks:
    """Hands every gradient, reduced to this rank's shard, to ``schedule``, and frees it.

    Args:
        parameters: those that train, in the order of the schedule's targets.
        shards: theirs.
        communication_dtype: what gradients are reduced in; None keeps their own.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        shards: list[Shard],
        schedule: Schedule,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        self.shards = shards
        self.schedule = schedule
        self.communication_dtype = communication_dtype
        self.seen: set[int] = set()  # what this backward has brought so far
        self.handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))
            for index, parameter in enumerate(parameters)
        ]

    def end_backward(self) -> None:
        """To be called when a backward pass has ended on this rank."""
        self.seen.clear()
        self.schedule.flush()

    def forget(self) -> None:
        """Forget a backward pass that an exception has cut short."""
        self.seen.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _on_gradient(self, index: int, parameter: Parameter) -> None:
        whole, parameter.grad = parameter.grad, None
        assert whole is not None
        shard = self.shards[index]
        self._refuse_second_gradient(index)
        if self.communication_dtype is not None:
            whole = whole.to(self.communication_dtype)
        reduced = reduce_scatter_shard(whole, shard.group)
        del whole
        self.schedule.take(index, reduced.narrow(0, 0, shard.data.numel()))

    def _refuse_second_gradient(self, index: int) -> None:
        """A stash adds up; the others would update twice, from a weight already changed."""
        if index in self.seen and not self.schedule.keeps_gradients:
            raise ConfigError(
                f"parameter {self.shards[index].name} received two gradients in one backward (it is shared between "
                "reentrant activation checkpoints), which needs them added up; use update_schedule stash, or "
                "checkpoint with use_reentrant false"
            )
        self.seen.add(index)
