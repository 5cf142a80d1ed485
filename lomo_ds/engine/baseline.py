"""What LOMO is compared with: DeepSpeed's own ZeRO-3 with torch.optim's AdamW or SGD, under LomoEngine's train_batch.

Forward, backward, gradient partitions, fp32 master weights and optimizer states are DeepSpeed's, and cost what they
cost there. Only what a step is comes from lomo_ds: the batch of all ranks and micro-batches, averaged over its labels.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from torch import Tensor
from torch.nn import Module

from lomo_ds.config.ds_fields import settle
from lomo_ds.config.lomo_config import refuse_what_no_baseline_can
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.distributed.process_group import start_process_group
from lomo_ds.engine.batches import Batch
from lomo_ds.engine.client_arguments import refuse_idle_scheduler, refuse_scheduler
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.engine.items import LabelWatch
from lomo_ds.engine.lr_schedulers import build_scheduler
from lomo_ds.engine.step_batch import StepBatch
from lomo_ds.errors import ConfigError, one_line
from lomo_ds.update.clipping import Clipping

logger = logging.getLogger(__name__)


def initialize_baseline(
    model: Module,
    config: dict[str, Any],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> "BaselineEngine":
    """An engine that trains ``model`` with the torch.optim optimizer that ``config`` names.

    Args:
        model: its parameters are split over the ranks, unless ``deepspeed.zero.Init`` has done so.
        config: a DeepSpeed config with ZeRO stage 3, as ``ds_config.reconcile`` fills it for ``--optim adamw | sgd``.

    Raises:
        ConfigError: something was asked for that cannot be done.
    """
    shutdown_init_context()
    try:
        config = settle(config)
        refuse_what_no_baseline_can(config)
        refuse_scheduler(lr_scheduler)
        start_process_group()
        config = settle(config, dist.get_world_size())
        engine = BaselineEngine(
            args=None, model=model, lr_scheduler=lr_scheduler, config=config, config_class=parse_ds_config(config)
        )
    except AssertionError as error:  # so DeepSpeed's ZeRO-3 says which of its settings do not go together
        raise ConfigError(f"DeepSpeed's ZeRO-3 refuses its config: {one_line(error)}") from error
    finally:
        restore_init_context()
    if engine.global_rank == 0:
        name, clipping = type(engine.basic_optimizer).__name__, Clipping(global_norm=engine.gradient_clipping() or None)
        logger.info("optimizer: torch.optim.%s on DeepSpeed's ZeRO-3; clipping: %s", name, clipping)
    return engine


class BaselineEngine(DeepSpeedEngine):
    """A ``DeepSpeedEngine`` over ZeRO-3 and a torch.optim optimizer, which takes the steps that ``LomoEngine`` takes.

    Where it differs from plain PyTorch: the weight decay of a parameter that the loss does not depend on is applied,
    since DeepSpeed steps flat partitions in which its gradient is 0.
    """

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next step; 1 unless training in fp16."""
        return float(self.optimizer.loss_scale)

    def train_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None = None) -> Tensor:
        """One whole optimizer step: the one plain PyTorch would take on all ranks' batches at once.

        Takes, returns and raises what ``LomoEngine.train_batch`` does, of any number of micro-batches.
        """
        step_batch = StepBatch(batch, num_items, self._labels, self.device, self.seq_data_parallel_group)
        try:
            loss = self._agree(self._backward_all(step_batch))
            if step_batch.skip_reason is not None:
                return self._skip(step_batch.skip_reason, math.nan, step_batch.scale_is_to_blame)
            if not math.isfinite(loss):
                return self._skip("a loss was not finite", loss, scale_is_to_blame=True)
            self._step_whole()
        except BaseException:
            self.optimizer.zero_grad()  # the next backward overwrites what was added up
            raise
        finally:
            self._is_gradient_accumulation_boundary = None
        return torch.tensor(loss, dtype=torch.float32, device=self.device)

    @cached_property
    def _labels(self) -> LabelWatch:
        return LabelWatch(self.module)

    def _backward_all(self, step_batch: StepBatch) -> Tensor:
        """Forward and backward of each micro-batch, its loss weighted by its share of the step's labels.

        Returns:
            This rank's part of the step's loss; 0-dim, float64.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position in range(len(step_batch)):
            self.set_gradient_accumulation_boundary(position == len(step_batch) - 1)
            loss = step_batch.forward(self, position)
            if step_batch.skip_reason is not None:
                break
            weight = step_batch.weight(position)
            total += loss.detach().double() * weight
            # ranks' gradients are averaged: what is a share of the step is that times the ranks on each rank
            self.backward(loss * (weight * dist.get_world_size(self.seq_data_parallel_group)), scale_wrt_gas=False)
        return total

    def _step_whole(self) -> None:
        """DeepSpeed's step, which clips, and skips for a gradient that is not finite."""
        skipped = self.skipped_steps
        self.set_gradient_accumulation_boundary(True)
        self.step()
        # step() has counted one micro-step; the step is a whole one, however many micro-batches it had
        self.micro_steps += self.gradient_accumulation_steps() - 1
        if self.skipped_steps > skipped:
            self._say_skipped("a gradient was not finite")

    def _skip(self, reason: str, loss: float, scale_is_to_blame: bool) -> Tensor:
        """Count a step that changes nothing, as ``step`` would; what backward has brought is forgotten."""
        self.optimizer.zero_grad()  # the next backward overwrites what was added up
        if self.optimizer.dynamic_loss_scale and scale_is_to_blame:
            self.optimizer.loss_scaler.update_scale(True)
        self._global_grad_norm = math.nan
        self._step_applied = False
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self.micro_steps += self.gradient_accumulation_steps()
        self._say_skipped(reason)
        return torch.tensor(loss, dtype=torch.float32, device=self.device)

    def _say_skipped(self, reason: str) -> None:
        if self.global_rank == 0:
            logger.warning(
                "step %d skipped, no weight was changed: %s (%d skipped so far, next loss scale %g)",
                self.global_steps, reason, self.skipped_steps, self.cur_scale,
            )  # fmt: skip

    def get_global_grad_norm(self) -> float | None:
        """Of the last step before clipping; not finite where it was skipped, None before the first."""
        norm = super().get_global_grad_norm()
        return None if norm is None else float(norm)

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """DeepSpeed's; at its smallest scale a run goes on, and says at every step that it was skipped."""
        return {**super().dynamic_loss_scale_args(), "raise_error_at_min_scale": False}

    def _scheduler_from_config(self, optimizer: Any) -> Any:
        name = self.scheduler_name()
        return name and build_scheduler(name, self.scheduler_params(), self.basic_optimizer)

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self.client_lr_scheduler is not None:
            refuse_idle_scheduler(self.lr_scheduler, (self.basic_optimizer, self.optimizer))

    def _agree(self, value: Tensor) -> float:
        return float(all_reduce_sum(value.to(self.device), self.seq_data_parallel_group))
