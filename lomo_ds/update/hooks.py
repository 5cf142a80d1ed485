"""Gradient hooks: take each parameter's gradient from autograd, pass it to the reduction and free it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lomo_ds.errors import ConfigError
from lomo_ds.update.reduction import Reduction
from lomo_ds.update.schedules import Schedule
from lomo_ds.update.target import Target

# Sums of more gradients are in fp32. The relative error of a sum in bf16 is 0.4 % for 16 gradients, 0.8 % for 64 and
# 1.9 % for 256; that of rounding once is 0.2 % (benchmarks/sums.py).
MAX_HALF_PRECISION_SUMMANDS = 16


def sum_dtype(dtype: torch.dtype, count: int, at_least: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which ``count`` gradients of ``dtype`` are added up.

    Args:
        at_least: the dtype that is configured for sums, or for their reduction; None for none.
    """
    needed = dtype if count <= MAX_HALF_PRECISION_SUMMANDS else torch.float32
    return needed if at_least is None else torch.promote_types(needed, at_least)


class BackwardHooks:
    """Reduces every gradient to this rank's shard, passes the shard to ``schedule``, and frees the gradient.

    Args:
        parameters: the trained parameters.
        targets: what the schedule knows ``parameters`` by, in the same order.
        process_group: the ranks that the parameters are partitioned over.
        communication_dtype: the dtype gradients are reduced in; None keeps their own.
        accumulation_dtype: see ``sum_dtype``.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        targets: list[Target],
        schedule: Schedule,
        process_group: ProcessGroup,
        communication_dtype: torch.dtype | None = None,
        accumulation_dtype: torch.dtype | None = None,
    ) -> None:
        self.schedule = schedule
        self.accumulation_dtype = accumulation_dtype
        self.reduction = Reduction(targets, process_group, communication_dtype, schedule.receive)
        self.arrived: set[Target] = set()  # those whose gradient has arrived in this backward
        self.sums: dict[Target, Tensor] | None = None  # of the gradients in ``summed``
        self.summands = 1
        self.parameter_of = dict(zip(targets, parameters, strict=True))
        self.handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, target))
            for target, parameter in self.parameter_of.items()
        ]

    @contextmanager
    def summed(self, count: int) -> Iterator[None]:
        """Add up the gradients of each parameter that arrive in this context, and process their sums at its end.

        Args:
            count: how many gradients of each parameter arrive; see ``sum_dtype``.
        """
        self.sums, self.summands = {}, count
        yield
        sums, self.sums = self.sums, None
        for target in list(sums):
            parameter = self.parameter_of[target]
            self._process(target, parameter, sums.pop(target).to(self.reduction.dtype or parameter.dtype))

    def end_backward(self) -> None:
        """Reduce and process the remaining gradients; call this after each backward pass."""
        self.arrived.clear()
        with torch.no_grad():
            self.reduction.flush()
            self.schedule.flush()

    def use_schedule(self, schedule: Schedule) -> None:
        """Pass gradient shards to another schedule from now on."""
        self.schedule = schedule
        self.reduction.on_reduced = schedule.receive

    def reset(self) -> None:
        """Discard the gradients of a backward pass that an exception has interrupted."""
        self.arrived.clear()
        self.sums = None
        self.reduction.reset()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def _on_gradient(self, target: Target, parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self.sums is None:
            self._process(target, parameter, gradient)
        elif target in self.sums:
            self.sums[target] += gradient
        else:
            self.sums[target] = gradient.to(sum_dtype(gradient.dtype, self.summands, self.accumulation_dtype))

    def _process(self, target: Target, parameter: Parameter, gradient: Tensor) -> None:
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
