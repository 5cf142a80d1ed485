"""LomoEngine: a DeepSpeed engine whose ZeRO-3 optimizer updates each parameter during backward.

``engine(...)``, ``engine.backward(loss)`` and ``engine.step()`` work as in DeepSpeed. ``engine.train_batch`` runs one
complete optimizer step under any update schedule.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomo_ds.checkpoint import Checkpoint, Saver, checkpoint_name, open_checkpoint, read_latest
from lomo_ds.config.lomo_config import OPTIMIZERS, read_lomo_config
from lomo_ds.distributed.collectives import all_reduce_sum, gather_objects
from lomo_ds.distributed.process_group import TIMEOUT
from lomo_ds.engine.base import TokenAveragingEngine
from lomo_ds.engine.batches import Batch, as_micro_batches
from lomo_ds.engine.build import build_optimizer
from lomo_ds.engine.build_schedule import build_schedule
from lomo_ds.engine.client_arguments import needs_metric
from lomo_ds.engine.engine_state import (
    advance_scheduler,
    capture_engine,
    full_state_dict,
    restore_engine,
    restore_weights,
)
from lomo_ds.engine.joined_batch import agree_to_join, join, reason_not_joined
from lomo_ds.engine.loss import as_scalar
from lomo_ds.engine.optimizer import LomoOptimizer, ParameterGroups
from lomo_ds.engine.passes import EnginePasses
from lomo_ds.engine.step_batch import StepBatch
from lomo_ds.errors import CheckpointError, ConfigError
from lomo_ds.models.layered import layered
from lomo_ds.update.accumulation import AccumulationChoice
from lomo_ds.update.schedules import Schedule
from lomo_ds.zero3.parameter_access import ParameterAccess

logger = logging.getLogger(__name__)


class LomoEngine(TokenAveragingEngine):
    """A ``DeepSpeedEngine`` with ZeRO-3 that updates parameters in backward and never keeps full gradients.

    A full gradient is reduced to this rank's shard and freed while backward continues.
    """

    optimizer: LomoOptimizer
    checkpoint_name: Callable[[int], str] = staticmethod(checkpoint_name)  # names a checkpoint after its step
    _in_train_batch = False

    @property
    def cur_scale(self) -> float:
        """Loss scale of the next step; 1 unless training in fp16."""
        return self.optimizer.cur_scale

    @property
    def schedule(self) -> Schedule:
        """Active update schedule."""
        return self.optimizer.schedule

    def _build_step_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None) -> StepBatch:
        """Return the batches of a step; with layered accumulation they are joined to one."""
        micro_batches = as_micro_batches(batch)
        if max(len(micro_batches), self.gradient_accumulation_steps()) == 1:  # on all ranks
            return super()._build_step_batch(batch, num_items)
        subject = f"train_batch got {len(micro_batches)} micro-batches"
        if not self.optimizer.accumulation.layered:
            if len(micro_batches) > 1 and not self.schedule.keeps_gradients:
                self._accumulate_in_stash(subject, self.optimizer.accumulation.reason)
            return super()._build_step_batch(batch, num_items)
        reason = reason_not_joined(micro_batches, num_items, self._label_observer.shifts)
        agreement = agree_to_join(reason, len(micro_batches), self._data_parallel_group, self.device)
        if agreement.reason is None:
            joined = join(micro_batches)
            step_batch = super()._build_step_batch(joined.batch, None)
            step_batch.joined = joined.micro_batches
            return step_batch
        if agreement.most > 1:
            self._accumulate_in_stash(subject, agreement.reason)
            agreement.require_equal_numbers()
        return super()._build_step_batch(batch, num_items)

    def _validate_train_batch(self) -> None:
        self._validate_scheduler_metric(None)
        if self.optimizer.backward_passes:
            raise ConfigError(
                f"train_batch must not run inside an unfinished step, but engine.backward has run "
                f"{self.optimizer.backward_passes} time(s) since the last step; call engine.step() first"
            )

    def _take_step(self, step_batch: StepBatch) -> float:
        self._in_train_batch = True
        try:
            with self._accumulating(step_batch):
                self.schedule.run(EnginePasses(self, self.optimizer, step_batch))
            self._finish_step()
        finally:
            self._in_train_batch = False
        return self.optimizer.loss

    def _accumulating(self, step_batch: StepBatch) -> AbstractContextManager[None]:
        if step_batch.joined is None:
            return nullcontext()
        return layered(self.module, step_batch.joined, self.optimizer.hooks.summed)

    def _abort_step(self) -> None:
        self.optimizer.abort_step()

    @property
    def _skip_reason(self) -> str | None:
        return self.optimizer.last_skip_reason

    def backward(
        self,
        loss: Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        learning_rate: None = None,
    ) -> Tensor:
        """Run ``DeepSpeedEngine.backward``; gradients are averaged over the ranks, as in DeepSpeed.

        Args:
            learning_rate: must be None. transformers' Trainer gives it to the optimizers of the package lomo-optim.

        Raises:
            ConfigError: the active schedule does not support this call, see ``train_batch``; ``loss`` is not a scalar
                with a graph; or there is a ``learning_rate``.
        """
        if learning_rate is not None:
            raise ConfigError(
                f"engine.backward takes no learning_rate, got {learning_rate}, because the engine has its own and its "
                "scheduler; leave optim out of TrainingArguments, as the DeepSpeed config names the optimizer"
            )
        loss = as_scalar(loss)
        if not self._in_train_batch:
            self._validate_backward()
        if self.schedule.updates_in_backward and not self._in_train_batch:
            bad_losses = all_reduce_sum((~loss.detach().isfinite()).double(), self._data_parallel_group)
            if bad_losses.item():
                self.optimizer.skip_step("a loss was not finite")
                return loss / self.gradient_accumulation_steps()
        try:
            return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        except BaseException:
            self.optimizer.abort_step()
            raise

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Run ``DeepSpeedEngine.step``, and log a warning if the step was skipped.

        Raises:
            ConfigError: the learning-rate scheduler needs a metric and ``lr_kwargs`` has none.
        """
        self._validate_scheduler_metric(lr_kwargs)
        super().step(lr_kwargs)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        *,
        add_files: Callable[[Path], None] | None = None,
        after_save: Callable[[], None] | None = None,
        in_background: bool = False,
    ) -> bool:
        """Write the complete training state to ``save_dir/tag``; call it on every rank, between steps.

        Args:
            tag: the folder name; by default ``checkpoint-<step>``, or ``global_step<step>`` after ``install``.
            client_state: caller data for ``load_checkpoint`` to return; must be JSON and equal on every rank.
            save_latest: whether to make ``latest`` point to this checkpoint.
            add_files, after_save, in_background: see ``Saver.save``.

        Returns:
            True, as in DeepSpeed.

        Raises:
            ConfigError: a step is unfinished; checkpoints do not contain gradients.
            CheckpointError: ``tag`` is a path; or see ``Saver.save``.
        """
        if self.optimizer.backward_passes:
            raise ConfigError(
                f"save_checkpoint must not run inside an unfinished step, but engine.backward has run "
                f"{self.optimizer.backward_passes} time(s) since the last step; call engine.step() first"
            )
        tag = tag or self.checkpoint_name(self.global_steps)
        if Path(tag).name != tag or tag == "..":
            raise CheckpointError(f"a checkpoint's tag must be the name of one folder in save_dir, got {tag!r}")
        self.saver.save(
            capture_engine(self, client_state),
            Path(save_dir) / tag,
            add_files,
            after_save,
            in_background,
            save_latest,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume from the checkpoint ``load_dir/tag``, by default the latest one; call it on every rank.

        The world size may differ from the one that saved the checkpoint. The weights are then still bit-identical,
        but dropout and stochastic rounding use different random numbers.

        Args:
            load_module_strict: must be True, because every tensor is loaded.
            load_optimizer_states: whether to restore the dynamic loss scale and the state of the update rules.
            load_lr_scheduler_states: whether to restore the scheduler, including its settings (base learning rate,
                milestones), and the learning rates; False keeps this engine's.
            load_module_only: whether to load only the weights and buffers.
            custom_load_fn: must be None.

        Returns:
            The checkpoint folder and its ``client_state``; (None, None) if ``load_dir`` has no checkpoint.

        Raises:
            LomoError: the checkpoint is damaged, or was saved with another model or scheduler type.
        """
        _validate_full_loading(load_module_strict, custom_load_fn)
        self.saver.wait()
        tag = tag or gather_objects(read_latest(Path(load_dir)), self.saver.group)[0]
        if tag is None:
            return None, None
        snapshot = capture_engine(self)
        checkpoint = open_checkpoint(Path(load_dir) / tag, snapshot.tensors, self.saver.group)
        if load_module_only:
            restore_weights(self, checkpoint, self.saver.group)
        else:
            restore_engine(self, checkpoint, self.saver.group, load_optimizer_states, load_lr_scheduler_states)
        return str(checkpoint.folder), checkpoint.record["client_state"]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a verified checkpoint; call it on every rank.

        The learning rate follows this engine's own scheduler, advanced by the number of steps already taken.
        """
        restore_engine(self, checkpoint, self.saver.group, scheduler=False)
        advance_scheduler(self)

    @cached_property
    def saver(self) -> Saver:
        """Saver of this engine's checkpoints, created collectively at the first save or load."""
        return Saver(torch.distributed.new_group(backend="gloo", timeout=TIMEOUT))

    def destroy(self) -> None:
        """Remove every hook from the model, and close the checkpoint saver."""
        super().destroy()
        self._parameter_access.remove()
        if "saver" in vars(self):
            self.saver.close()
            del self.saver

    def _backward_prologue(self) -> None:
        if not self._in_train_batch:
            self._validate_backward()
        self.optimizer.gathering.begin_backward()
        super()._backward_prologue()

    def _validate_scheduler_metric(self, lr_kwargs: dict[str, Any] | None) -> None:
        """Raise if the scheduler needs a metric and got none; DeepSpeed would pass it the batch size instead."""
        if needs_metric(self.lr_scheduler) and not lr_kwargs:
            raise ConfigError(
                f"{type(self.lr_scheduler).__name__} needs a metric, which train_batch and transformers' Trainer do "
                "not provide; use another scheduler, or engine.backward(loss) and engine.step({'metrics': metric})"
            )

    def _validate_backward(self) -> None:
        """Raise if the active schedule does not support separate ``backward`` and ``step`` calls.

        ``_backward_prologue`` calls this too, so a plain ``loss.backward()`` is also checked.
        """
        ends_step = self.is_gradient_accumulation_boundary()
        if not ends_step and self.optimizer.accumulation.layered and not self.optimizer.backward_passes:
            self._accumulate_in_stash(
                "engine.backward got one of several micro-batches", "train_batch takes all at once"
            )
        if self.schedule.passes == 2:
            raise ConfigError(
                "update_schedule two_pass must run every batch forward and backward twice, which engine.backward "
                "cannot do; call engine.train_batch(batch), or use update_schedule stash"
            )
        if not self.schedule.keeps_gradients and (self.optimizer.backward_passes or not ends_step):
            raise ConfigError(
                "update_schedule immediate cannot accumulate gradients, but got several backward passes in one step; "
                "call engine.step() after each backward, or use update_schedule stash"
            )

    def _accumulate_in_stash(self, subject: str, reason: str) -> None:
        """Give up layered accumulation from now on, and use a schedule that adds up several gradients.

        Args:
            subject: what needs accumulation, for the error message.
            reason: why it cannot be layered.

        Raises:
            ConfigError: the settings ask for layered accumulation, or for a schedule that keeps no gradients.
        """
        if read_lomo_config(self.config).accumulation == "layered":
            raise ConfigError(f"{subject}, but accumulation layered is not possible: {reason}; leave accumulation out")
        updater, clipping = self.schedule.updater, self.schedule.clipping
        try:
            choice, schedule = build_schedule(self, updater, clipping, self.optimizer.free_bytes, accumulates=True)
        except ConfigError as error:
            rule = f"{subject}, but {error}; layered accumulation is not possible"
            raise ConfigError(f"{rule}: {reason}") from None
        self.optimizer.accumulation = AccumulationChoice(False, reason)
        self.optimizer.use_schedule(choice, schedule)
        if self.global_rank == 0:
            logger.info("accumulation: %s", self.optimizer.accumulation)

    def zero_optimization_partition_weights(self) -> bool:
        """Return whether weights are gathered for each use; False for ``ResidentGathering``, which needs no hooks."""
        built = self.optimizer is not None
        return super().zero_optimization_partition_weights() and not (built and self.optimizer.gathering.resident)

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Return True: ``save_model`` of transformers and accelerate always writes a model that can be loaded."""
        return True

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        return full_state_dict(self.module, exclude_frozen_parameters)

    def _broadcast_model(self) -> None:
        """Skip the broadcast: full parameters get the values of rank 0 when they are partitioned."""

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return optimizer_name.lower() in OPTIMIZERS

    def _configure_optimizer(self, client_optimizer: None, model_parameters: list[Any]) -> None:
        lomo = read_lomo_config(self.config)
        self.basic_optimizer = ParameterGroups(model_parameters, lomo.lr, lomo.weight_decay)
        self.optimizer = build_optimizer(self, self.basic_optimizer, lomo)
        self._parameter_access = ParameterAccess(self.module)


def _validate_full_loading(load_module_strict: bool, custom_load_fn: None) -> None:
    if not load_module_strict:
        raise ConfigError(
            "load_module_strict False is not supported, because each rank loads its own shards of every tensor; load "
            "into the model that was saved, or export the checkpoint and load the exported model"
        )
    if custom_load_fn is not None:
        raise ConfigError(
            "custom_load_fn is not supported, because no rank ever holds a full state_dict; export the checkpoint, "
            "change the exported model, and start from it"
        )
