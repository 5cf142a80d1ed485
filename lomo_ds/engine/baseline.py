"""Baseline engine to compare LOMO with: DeepSpeed's own ZeRO-3 with torch.optim's AdamW or SGD.

Forward, backward, gradient partitions, fp32 master weights and optimizer states are DeepSpeed's, at their usual cost.
Only ``train_batch`` comes from lomo_ds: it averages the loss over the labels of all ranks and micro-batches.
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
from lomo_ds.config.validation import validate_baseline_config
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.distributed.process_group import start_process_group
from lomo_ds.engine.batches import Batch
from lomo_ds.engine.client_arguments import validate_built_scheduler, validate_scheduler_factory
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.engine.items import LabelObserver
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
    """Build an engine that trains ``model`` with the torch.optim optimizer named in ``config``.

    Args:
        model: the model to train. Its parameters are partitioned over the ranks here, unless ``deepspeed.zero.Init``
            has already partitioned them.
        config: a DeepSpeed config with ZeRO stage 3, completed by ``ds_config.reconcile`` for ``--optim adamw | sgd``.

    Raises:
        ConfigError: an argument or a setting is invalid or not supported.
    """
    shutdown_init_context()
    try:
        config = settle(config)
        validate_baseline_config(config)
        validate_scheduler_factory(lr_scheduler)
        start_process_group()
        config = settle(config, dist.get_world_size())
        engine = BaselineEngine(
            args=None, model=model, lr_scheduler=lr_scheduler, config=config, config_class=parse_ds_config(config)
        )
    except AssertionError as error:  # DeepSpeed's ZeRO-3 asserts that its settings are compatible
        raise ConfigError(f"DeepSpeed's ZeRO-3 rejects its config: {one_line(error)}") from error
    finally:
        restore_init_context()
    if engine.global_rank == 0:
        name, clipping = type(engine.basic_optimizer).__name__, Clipping(global_norm=engine.gradient_clipping() or None)
        logger.info("optimizer: torch.optim.%s on DeepSpeed's ZeRO-3; clipping: %s", name, clipping)
    return engine


class BaselineEngine(DeepSpeedEngine):
    """A ``DeepSpeedEngine`` with ZeRO-3 and a torch.optim optimizer, with the same ``train_batch`` as ``LomoEngine``.

    One difference to plain PyTorch: weight decay also applies to parameters that the loss does not depend on, because
    DeepSpeed steps flat partitions in which their gradient is 0.
    """

    @property
    def cur_scale(self) -> float:
        """Loss scale of the next step; 1 unless training in fp16."""
        return float(self.optimizer.loss_scale)

    def train_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None = None) -> Tensor:
        """Run one complete optimizer step, equal to that of plain PyTorch on the batches of all ranks together.

        Arguments, result and exceptions are those of ``LomoEngine.train_batch``; any number of micro-batches is
        supported.
        """
        step_batch = StepBatch(batch, num_items, self._label_observer, self.device, self.seq_data_parallel_group)
        try:
            loss = self._sum_over_ranks(self._backward_all(step_batch))
            if step_batch.skip_reason is not None:
                return self._skip(step_batch.skip_reason, math.nan, step_batch.counts_as_overflow)
            if not math.isfinite(loss):
                return self._skip("a loss was not finite", loss, counts_as_overflow=True)
            self._finish_step()
        except BaseException:
            self.optimizer.zero_grad()  # the next backward overwrites the accumulated gradients
            raise
        finally:
            self._is_gradient_accumulation_boundary = None
        return torch.tensor(loss, dtype=torch.float32, device=self.device)

    @cached_property
    def _label_observer(self) -> LabelObserver:
        return LabelObserver(self.module)

    def _backward_all(self, step_batch: StepBatch) -> Tensor:
        """Run forward and backward for each micro-batch, with its loss weighted by its share of the step's labels.

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
            # gradients are averaged over the ranks, so multiply by the world size to sum the weighted losses
            self.backward(loss * (weight * dist.get_world_size(self.seq_data_parallel_group)), scale_wrt_gas=False)
        return total

    def _finish_step(self) -> None:
        """Run DeepSpeed's step, which clips gradients and skips the step if one is not finite."""
        skipped = self.skipped_steps
        self.set_gradient_accumulation_boundary(True)
        self.step()
        # step() has counted one micro-step, but this was a complete optimizer step
        self.micro_steps += self.gradient_accumulation_steps() - 1
        if self.skipped_steps > skipped:
            self._log_skipped_step("a gradient was not finite")

    def _skip(self, reason: str, loss: float, counts_as_overflow: bool) -> Tensor:
        """Count a step that changes nothing, as ``step`` would, and discard its gradients."""
        self.optimizer.zero_grad()  # the next backward overwrites the accumulated gradients
        if self.optimizer.dynamic_loss_scale and counts_as_overflow:
            self.optimizer.loss_scaler.update_scale(True)
        self._global_grad_norm = math.nan
        self._step_applied = False
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self.micro_steps += self.gradient_accumulation_steps()
        self._log_skipped_step(reason)
        return torch.tensor(loss, dtype=torch.float32, device=self.device)

    def _log_skipped_step(self, reason: str) -> None:
        if self.global_rank == 0:
            logger.warning(
                "step %d skipped, no weight was changed: %s (%d skipped so far, next loss scale %g)",
                self.global_steps, reason, self.skipped_steps, self.cur_scale,
            )  # fmt: skip

    def get_global_grad_norm(self) -> float | None:
        """Return the gradient norm of the last step before clipping.

        It is not finite if the step was skipped, and None before the first step.
        """
        norm = super().get_global_grad_norm()
        return None if norm is None else float(norm)

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """Return DeepSpeed's arguments, changed so that a run at the smallest loss scale continues and logs skips."""
        return {**super().dynamic_loss_scale_args(), "raise_error_at_min_scale": False}

    def _scheduler_from_config(self, optimizer: Any) -> Any:
        name = self.scheduler_name()
        return name and build_scheduler(name, self.scheduler_params(), self.basic_optimizer)

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self.client_lr_scheduler is not None:
            validate_built_scheduler(self.lr_scheduler, (self.basic_optimizer, self.optimizer))

    def _sum_over_ranks(self, value: Tensor) -> float:
        return float(all_reduce_sum(value.to(self.device), self.seq_data_parallel_group))
