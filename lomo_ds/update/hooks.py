"""The hooks in the backward pass: one parameter's gradient from autograd to its reduction, and gone."""

from functools import partial

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lomo_ds.errors import ConfigError
from lomo_ds.update.reduction import Reduction
from lomo_ds.update.schedules import Schedule
from lomo_ds.zero3 import Shard


class BackwardHooks:
    """Hands every gradient, reduced to this rank's shard, to ``schedule``, and frees it.

    Args:
        parameters: those that train, in the order of the schedule's targets.
        shards: theirs.
        ranks: those that the parameters are split over.
        communication_dtype: what gradients are reduced in; None keeps their own.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        shards: list[Shard],
        schedule: Schedule,
        ranks: ProcessGroup,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        self.names = [shard.name for shard in shards]
        self.schedule = schedule
        self.reduction = Reduction(
            [shard.shape.numel() for shard in shards],
            [shard.data.numel() for shard in shards],
            ranks,
            communication_dtype,
            schedule.take,
        )
        self.seen: set[int] = set()  # what this backward has brought so far
        self.handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))
            for index, parameter in enumerate(parameters)
        ]

    def end_backward(self) -> None:
        """To be called when a backward pass has ended on this rank."""
        self.seen.clear()
        with torch.no_grad():
            self.reduction.flush()
            self.schedule.flush()

    def forget(self) -> None:
        """Forget a backward pass that an exception has cut short."""
        self.seen.clear()
        self.reduction.forget()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _on_gradient(self, index: int, parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if index in self.seen and not self.schedule.keeps_gradients:
            self._refuse_second_gradient(index)
        self.seen.add(index)
        self.schedule.offer_gathered_weight(index, parameter.data)
        self.reduction.add(index, gradient)

    def _refuse_second_gradient(self, index: int) -> None:
        """A stash adds up; the others would update twice, from a weight already changed."""
        raise ConfigError(
            f"parameter {self.names[index]} received two gradients in one backward (it is shared between reentrant "
            "activation checkpoints), which needs them added up; use update_schedule stash, or checkpoint with "
            "use_reentrant false"
        )
