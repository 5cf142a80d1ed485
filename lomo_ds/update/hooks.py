"""Gradient hooks: take each parameter's gradient from autograd, pass it to the reduction and free it."""

from functools import partial

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lomo_ds.errors import ConfigError
from lomo_ds.update.reduction import Reduction
from lomo_ds.update.schedules import Schedule
from lomo_ds.update.target import Target


class BackwardHooks:
    """Reduces every gradient to this rank's shard, passes the shard to ``schedule``, and frees the gradient.

    Args:
        parameters: the trained parameters.
        targets: what the schedule knows ``parameters`` by, in the same order.
        process_group: the ranks that the parameters are partitioned over.
        communication_dtype: the dtype gradients are reduced in; None keeps their own.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        targets: list[Target],
        schedule: Schedule,
        process_group: ProcessGroup,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        self.schedule = schedule
        self.reduction = Reduction(targets, process_group, communication_dtype, schedule.receive)
        self.arrived: set[Target] = set()  # those whose gradient has arrived in this backward
        self.handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, target))
            for target, parameter in zip(targets, parameters, strict=True)
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

    def _on_gradient(self, target: Target, parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if target in self.arrived and not self.schedule.keeps_gradients:
            self._raise_second_gradient(target)
        self.arrived.add(target)
        self.schedule.offer_gathered_weight(target, parameter.data)
        self.reduction.add(target, self.schedule.updater.project(target, gradient))

    def _raise_second_gradient(self, target: Target) -> None:
        """Raise an error: a schedule that does not accumulate would update the parameter twice."""
        raise ConfigError(
            f"parameter {target.name} received two gradients in one backward (it is shared between reentrant "
            "activation checkpoints), and this update schedule cannot accumulate them; use update_schedule stash, or "
            "checkpoint with use_reentrant false"
        )
