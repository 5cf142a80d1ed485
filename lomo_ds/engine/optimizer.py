"""The optimizer of LomoEngine: owns ZeRO-3 gathering and the backward hooks, and finishes each step."""

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
from lomo_ds.update.accumulation import AccumulationChoice
from lomo_ds.update.hooks import BackwardHooks
from lomo_ds.update.schedules import Choice, Schedule
from lomo_ds.zero3.gathering import Gathering

logger = logging.getLogger(__name__)

LOSS_SCALER_STATE = ("cur_scale", "cur_hysteresis", "last_overflow_iter", "cur_iter")


class ParameterGroups(torch.optim.Optimizer):
    """Parameter groups with learning rate and weight decay, in the form that learning-rate schedulers need."""

    def __init__(self, parameters: list[Any], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the weights change during backward."""


class LomoOptimizer(ZeROOptimizer):
    """Finishes each step: all-reduces overflow, norm and loss, completes the schedule and refreshes gathered copies.

    Args:
        groups: the parameters and their learning rates.
        gathering: gathers full parameters for the modules.
        hooks: pass the gradients to ``schedule``.
        choice: the resolved schedule settings.
        accumulation: how ``train_batch`` accumulates micro-batches.
        free_bytes: free bytes of device and host before the first step, see ``min_free_bytes``.
        process_group: the process group of the data-parallel ranks.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        gathering: Gathering,
        hooks: BackwardHooks,
        schedule: Schedule,
        choice: Choice,
        accumulation: AccumulationChoice,
        free_bytes: list[int],
        loss_scaler: LossScalerBase,
        process_group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.optimizer = groups
        self.gathering = gathering
        self.hooks = hooks
        self.schedule = schedule
        self.choice = choice
        self.accumulation = accumulation
        self.free_bytes = free_bytes
        self.loss_scaler = loss_scaler
        self.process_group = process_group
        # read by ZeROOptimizer.scale_if_loss and needs_scaler
        self.dynamic_loss_scale = loss_scaler.dynamic
        self.custom_loss_scaler = False
        self.external_loss_scale = 1.0
        self.torch_autocast_gradscaler = None
        # read by DeepSpeedEngine after a step, as is overflow
        self._global_grad_norm: float | None = None
        # loss of the last step over all ranks; nan if only the caller knows the losses, or if a loss was not finite
        self.loss: float = math.nan
        self.skip_reason: str | None = None  # why the current step must be skipped, None if it need not
        self.last_skip_reason: str | None = None
        self._start_step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Live param groups: the next update uses the ``lr`` that a scheduler sets here."""
        return self.optimizer.param_groups

    @property
    def chosen_settings(self) -> dict[str, str]:
        """Parameters of LOMO that request explicitly what was chosen for ``auto``."""
        settings = self.choice.settings | {"gather_granularity": self.gathering.granularity}
        return settings | {"accumulation": self.accumulation.name}

    @property
    def cur_scale(self) -> float:
        """Loss scale of the next step; 1 unless training in fp16."""
        return float(self.loss_scaler.loss_scale)

    @property
    def overflow(self) -> bool:
        """Return whether the last step was skipped."""
        return self.last_skip_reason is not None

    def use_schedule(self, choice: Choice, schedule: Schedule) -> None:
        """Replace the update schedule between two steps."""
        self.choice, self.schedule = choice, schedule
        self.hooks.use_schedule(schedule)
        self._start_step()

    def set_loss(self, contribution: Tensor) -> None:
        """Set this rank's part of the step's loss (0-dim, detached); it is all-reduced together with the norm."""
        self._loss_sum.copy_(contribution)
        self._has_loss = True

    def skip_step(self, reason: str, counts_as_overflow: bool = True) -> None:
        """Mark the current step as skipped, without a collective; every rank must call it with the same arguments."""
        self.skip_reason = reason
        self._counts_as_overflow = counts_as_overflow
        self._global_grad_norm, self.loss = math.nan, math.nan
        self._is_decided = True

    def reduce_norms_and_loss(self) -> list[float]:
        """Sum squared norms and loss over the ranks in one collective, and decide whether to skip the step.

        Returns:
            The clip coefficient of each clipping group.
        """
        squared_norms = self.schedule.squared_norms() / self.schedule.scale**2
        totals = all_reduce_sum(torch.cat([squared_norms, self._loss_sum]), self.process_group).cpu()
        self._global_grad_norm = float(totals[:-1].sum().sqrt())
        self.loss = float(totals[-1]) if self._has_loss else math.nan
        if not totals[-1].isfinite():
            self.skip_reason = "a loss was not finite"
        elif not math.isfinite(self._global_grad_norm):
            self.skip_reason = "a gradient was not finite"
        self._is_decided = True
        return self.schedule.clipping.coefficients(totals[:-1]).tolist()

    def step(self, closure: Any = None) -> None:
        """Finish the current step after its backward passes.

        Raises:
            NonFiniteGradientError: the schedule has already updated weights with an inf or nan.
        """
        if not self._is_decided:
            coefficients = self.reduce_norms_and_loss()
            if self.skip_reason is None:
                self.schedule.apply(coefficients)
            elif self.schedule.updates_in_backward:
                raise NonFiniteGradientError(
                    f"{self.skip_reason}, and update_schedule immediate has already updated weights with it; restart "
                    "from saved weights with a lower learning rate, or with update_schedule stash, which skips such "
                    "steps"
                )
        self.last_skip_reason = self.skip_reason
        if not self.overflow:
            self.schedule.updater.step += 1
        self.optimizer.step()  # learning-rate schedulers warn if it is never called
        if self.dynamic_loss_scale and (self._counts_as_overflow or not self.overflow):
            self.loss_scaler.update_scale(self.overflow)
        self.gathering.refresh()
        self._start_step()

    def abort_step(self) -> None:
        """Discard the current step while an exception that interrupted it is being raised.

        Training can continue with another step on one rank, or if all ranks failed at the same place. Nothing of the
        discarded step remains, except weights and rule state that ``immediate`` has already updated; modules see the
        current shards.
        If only some ranks failed, they have called fewer collectives than the others, and the job must end.
        """
        self.hooks.reset()
        try:
            self.gathering.drop()
        except Exception as error:  # must not hide the original exception
            logger.warning("training cannot continue after the exception that follows: %s", error)
        self._start_step()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """End a backward pass; DeepSpeed calls this method by this name."""
        self.backward_passes += 1
        self.hooks.end_backward()
        self.gathering.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: no gradient outlives its hook."""

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scaler's state, the learning rates and the number of the next update, as JSON."""
        scaler = vars(self.loss_scaler)
        return {
            "loss_scaler": {name: scaler[name] for name in LOSS_SCALER_STATE if name in scaler},
            "lr": [group["lr"] for group in self.param_groups],
            "update": self.schedule.updater.step,
        }

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """Restore the dynamic loss scale from a ``state_dict``; a static one always comes from the config."""
        saved = state["loss_scaler"]
        if self.dynamic_loss_scale and set(saved) == set(self.state_dict()["loss_scaler"]):
            for name, value in saved.items():
                setattr(self.loss_scaler, name, value)

    def load_update_number(self, state: dict[str, Any]) -> None:
        """Restore the number of the next update from a ``state_dict``."""
        self.schedule.updater.step = state["update"]

    def load_learning_rates(self, state: dict[str, Any]) -> None:
        """Restore the learning rates from a ``state_dict``."""
        for group, lr in zip(self.param_groups, state["lr"], strict=True):
            group["lr"] = lr

    def reset_after_load(self) -> None:
        """Start a new step after shards or the loss scale have been loaded."""
        self.gathering.refresh()
        self._start_step()

    def destroy(self) -> None:
        """Remove every hook from the model."""
        self.hooks.remove()
        self.gathering.destroy()

    def _start_step(self) -> None:
        world_size = torch.distributed.get_world_size(self.process_group)
        self.schedule.start(scale=self.cur_scale * world_size)
        self.backward_passes = 0  # of the current step
        self.skip_reason = None
        self._counts_as_overflow = True
        self._is_decided = False
        self._loss_sum = torch.zeros(1, dtype=torch.float64, device=self.schedule.device)
        self._has_loss = False
