"""Baseline engine to compare LOMO with: DeepSpeed's own ZeRO-3 with torch.optim's AdamW or SGD.

Forward, backward, gradient partitions, fp32 master weights and optimizer states are DeepSpeed's, at their usual cost.
Only ``train_batch`` comes from lomo_ds: it averages the loss over the labels of all ranks and micro-batches.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.config.validation import validate_baseline_config
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.distributed.process_group import start_process_group
from lomo_ds.engine.base import TokenAveragingEngine, outside_zero_init
from lomo_ds.engine.client_arguments import validate_scheduler_factory
from lomo_ds.engine.ds_parse import parse_ds_config
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
    with outside_zero_init():
        config = complete_ds_config(config)
        validate_baseline_config(config)
        validate_scheduler_factory(lr_scheduler)
        start_process_group()
        config = complete_ds_config(config, torch.distributed.get_world_size())
        parsed = parse_ds_config(config)
        try:
            engine = BaselineEngine(
                args=None, model=model, lr_scheduler=lr_scheduler, config=config, config_class=parsed
            )
        except AssertionError as error:  # DeepSpeed's ZeRO-3 asserts that its settings are compatible
            raise ConfigError(f"DeepSpeed's ZeRO-3 rejects its config: {one_line(error)}") from error
    if engine.global_rank == 0:
        name, clipping = type(engine.basic_optimizer).__name__, Clipping(global_norm=engine.gradient_clipping() or None)
        logger.info("optimizer: torch.optim.%s on DeepSpeed's ZeRO-3; clipping: %s", name, clipping)
    return engine


class BaselineEngine(TokenAveragingEngine):
    """A ``DeepSpeedEngine`` with ZeRO-3 and a torch.optim optimizer, with the same ``train_batch`` as ``LomoEngine``.

    One difference to plain PyTorch: weight decay also applies to parameters that the loss does not depend on, because
    DeepSpeed steps flat partitions in which their gradient is 0.
    """

    _skip_reason = "a gradient was not finite"  # the only reason for which DeepSpeed itself skips a step

    @property
    def cur_scale(self) -> float:
        """Loss scale of the next step; 1 unless training in fp16."""
        return float(self.optimizer.loss_scale)

    def _take_step(self, step_batch: StepBatch) -> float:
        local_loss = self.backward_all(step_batch).to(self.device)
        loss = float(all_reduce_sum(local_loss, self._data_parallel_group))
        if step_batch.skip_reason is not None:
            self._skip(step_batch.skip_reason, step_batch.counts_as_overflow)
            return math.nan
        if math.isfinite(loss):
            self._finish_step()
        else:
            self._skip("a loss was not finite", counts_as_overflow=True)
        return loss

    def _abort_step(self) -> None:
        self.optimizer.zero_grad()  # the next backward overwrites the accumulated gradients

    def _skip(self, reason: str, counts_as_overflow: bool) -> None:
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

    def get_global_grad_norm(self) -> float | None:
        """Return the gradient norm of the last step before clipping.

        It is not finite if the step was skipped, and None before the first step.
        """
        norm = super().get_global_grad_norm()
        return None if norm is None else float(norm)

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """Return DeepSpeed's arguments, changed so that a run at the smallest loss scale continues and logs skips."""
        return {**super().dynamic_loss_scale_args(), "raise_error_at_min_scale": False}
