"""What DeepSpeed's engine calls its optimizer: ZeRO-3 gathering, the backward hooks and the end of a step."""

import logging
import math
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.errors import NonFiniteGradientError
from lomo_ds.update.hooks import BackwardHooks
from lomo_ds.update.schedules import Choice, Schedule
from lomo_ds.zero3.gathering import Gathering

logger = logging.getLogger(__name__)

LOSS_SCALER_STATE = ("cur_scale", "cur_hysteresis", "last_overflow_iter", "cur_iter")


class ParameterGroups(torch.optim.Optimizer):
    """Parameters with their learning rate and weight decay, as learning-rate schedulers want to see them."""

    def __init__(self, parameters: list[Any], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the weights change during backward."""


class LomoOptimizer(ZeROOptimizer):
    """Ends each step: all ranks agree on overflow, norm and loss, then the schedule finishes and shards are refreshed.

    Args:
        groups: the parameters and their learning rates.
        gathering: gives modules their whole parameters.
        hooks: bring the gradients to ``schedule``.
        choice: what the settings of the schedule came to.
        process_group: the process group of the data-parallel ranks.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        gathering: Gathering,
        hooks: BackwardHooks,
        schedule: Schedule,
        choice: Choice,
        loss_scaler: LossScalerBase,
        process_group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.optimizer = groups
        self.gathering = gathering
        self.hooks = hooks
        self.schedule = schedule
        self.choice = choice
        self.loss_scaler = loss_scaler
        self.process_group = process_group
        # read by ZeROOptimizer.scale_if_loss and needs_scaler
        self.dynamic_loss_scale = loss_scaler.dynamic
        self.custom_loss_scaler = False
        self.external_loss_scale = 1.0
        self.torch_autocast_gradscaler = None
        # read by DeepSpeedEngine after a step, as is overflow
        self._global_grad_norm: float | None = None
        # of the last step, over all ranks; nan where only the caller knows the losses, or the step was skipped for one
        self.loss: float = math.nan
        self.skip_reason: str | None = None  # why the step under way must change nothing
        self.last_skip_reason: str | None = None
        self._start_step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Live: a scheduler that sets ``lr`` here is obeyed at the next update."""
        return self.optimizer.param_groups

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next step; 1 unless training in fp16."""
        return float(self.loss_scaler.loss_scale)

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped."""
        return self.last_skip_reason is not None

    def add_loss(self, contribution: Tensor) -> None:
        """Count this rank's part of the step's loss (0-dim, detached), to be agreed on with the norm."""
        self._loss_sum += contribution
        self._knows_loss = True

    def skip_step(self, reason: str, counts_as_overflow: bool = True) -> None:
        """All ranks know that the step under way must change nothing, without asking one another again."""
        self.skip_reason = reason
        self._counts_as_overflow = counts_as_overflow
        self._global_grad_norm, self.loss = math.nan, math.nan
        self._agreed = True

    def reduce_norms_and_loss(self) -> list[float]:
        """The step's one collective: overflow, global norm and loss; returns the clip factors of the groups."""
        squared_norms = self.schedule.measure() / self.schedule.scale**2
        agreed = all_reduce_sum(torch.cat([squared_norms, self._loss_sum]), self.process_group).cpu()
        self._global_grad_norm = float(agreed[:-1].sum().sqrt())
        self.loss = float(agreed[-1]) if self._knows_loss else math.nan
        if not agreed[-1].isfinite():
            self.skip_reason = "a loss was not finite"
        elif not math.isfinite(self._global_grad_norm):
            self.skip_reason = "a gradient was not finite"
        self._agreed = True
        return self.schedule.clipping.coefficients(agreed[:-1]).tolist()

    def step(self, closure: Any = None) -> None:
        """Finish the step whose gradients backward has brought.

        Raises:
            NonFiniteGradientError: the schedule had already updated weights from an inf or nan.
        """
        if not self._agreed:
            coefficients = self.reduce_norms_and_loss()
            if self.skip_reason is None:
                self.schedule.apply(coefficients)
            elif self.schedule.updates_in_backward:
                raise NonFiniteGradientError(
                    f"{self.skip_reason}, and update_schedule immediate has already put it into the weights; start "
                    "again from saved weights with a lower learning rate, or with update_schedule stash, which skips "
                    "such a step"
                )
        self.last_skip_reason = self.skip_reason
        self.optimizer.step()  # learning-rate schedulers want to have seen it
        if self.dynamic_loss_scale and (self._counts_as_overflow or not self.overflow):
            self.loss_scaler.update_scale(self.overflow)
        self.gathering.refresh()
        self._start_step()

    def abort_step(self) -> None:
        """Forget a step that an exception has cut short, while it is being raised.

        One rank, or several that have all failed at the same place, may go on with another step: nothing of this one
        is left but, under ``immediate``, the weights it has updated, and every module computes with the shards as they
        are. Where only some ranks have failed, they have called fewer collectives than the others; the job must end.
        """
        self.hooks.forget()
        try:
            self.gathering.drop()
        except Exception as error:  # which must not hide the first one
            logger.warning("after the exception that follows no step can be taken: %s", error)
        self._start_step()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """DeepSpeed's name for the end of a backward pass."""
        self.backward_passes += 1
        self.hooks.end_backward()
        self.gathering.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: no gradient outlives its hook."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside weights and rule, as JSON: the loss scale's counters, learning rates."""
        scaler = vars(self.loss_scaler)
        return {
            "loss_scaler": {name: scaler[name] for name in LOSS_SCALER_STATE if name in scaler},
            "lr": [group["lr"] for group in self.param_groups],
        }

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """Go on with the loss scale of a ``state_dict``; a fixed one is the config's, then and now."""
        saved = state["loss_scaler"]
        if self.dynamic_loss_scale and set(saved) == set(self.state_dict()["loss_scaler"]):
            for name, value in saved.items():
                setattr(self.loss_scaler, name, value)

    def load_learning_rates(self, state: dict[str, Any]) -> None:
        """Go on with the learning rates of a ``state_dict``."""
        for group, lr in zip(self.param_groups, state["lr"], strict=True):
            group["lr"] = lr

    def reset_after_load(self) -> None:
        """Let the next step see shards that have been filled, and the loss scale as it is now."""
        self.gathering.refresh()
        self._start_step()

    def destroy(self) -> None:
        """Take every hook off the model."""
        self.hooks.remove()
        self.gathering.destroy()

    def _start_step(self) -> None:
        world_size = torch.distributed.get_world_size(self.process_group)
        self.schedule.start(scale=self.cur_scale * world_size)
        self.backward_passes = 0  # of the step under way
        self.skip_reason = None
        self._counts_as_overflow = True
        self._agreed = False
        self._loss_sum = torch.zeros(1, dtype=torch.float64, device=self.schedule.device)
        self._knows_loss = False
