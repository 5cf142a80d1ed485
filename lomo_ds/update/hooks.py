"""Gradient hooks: take each parameter's gradient from autograd, pass it to the reduction and free it."""

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
    """Reduces every gradient to this rank's shard, passes the shard to ``schedule``, and frees the gradient.

    Args:
        parameters: the trained parameters, in the order of the schedule's targets.
        shards: this rank's shards of ``parameters``, in the same order.
        process_group: the ranks that the parameters are partitioned over.
        communication_dtype: the dtype gradients are reduced in; None keeps their own.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        shards: list[Shard],
        schedule: Schedule,
        process_group: ProcessGroup,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        self.names = [shard.name for shard in shards]
        self.schedule = schedule
        self.reduction = Reduction(
            [shard.shape.numel() for shard in shards],
            [shard.data.numel() for shard in shards],
            process_group,
            communication_dtype,
            schedule.receive,
        )
        self.arrived: set[int] = set()  # parameters whose gradient has arrived in this backward
        self.handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))
            for index, parameter in enumerate(parameters)
        ]

    def end_backward(self) -> None:
        """Reduce and process the remaining gradients; call this after each backward pass."""
        self.arrived.clear()
        with torch.no_grad():
            self.reduction.flush()
            self.schedule.flush()

    def reset(self) -> None:
        """Discard the gradients of a backward pass that an exception has interrupted."""
        self.arrived.clear()
        self.reduction.reset()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def _on_gradient(self, index: int, parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if index in self.arrived and not self.schedule.keeps_gradients:
            self._raise_second_gradient(index)
        self.arrived.add(index)
        self.schedule.offer_gathered_weight(index, parameter.data)
        self.reduction.add(index, gradient)

    def _raise_second_gradient(self, index: int) -> None:
        """Raise an error: a schedule that does not accumulate would update the parameter twice."""
        raise ConfigError(
            f"parameter {self.names[index]} received two gradients in one backward (it is shared between reentrant "
            "activation checkpoints), and this update schedule cannot accumulate them; use update_schedule stash, or "
            "checkpoint with use_reentrant false"
        )
