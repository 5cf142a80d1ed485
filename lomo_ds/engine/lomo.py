"""LomoEngine: a DeepSpeed engine whose ZeRO-3 optimizer updates each parameter during backward.

The idiom ``engine(...)``, ``engine.backward(loss)``, ``engine.step()`` is DeepSpeed's own; ``engine.train_batch`` is
one whole optimizer step under any update schedule.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.utils.data import Dataset

from lomo_ds.checkpoint import Checkpoint, Saver, checkpoint_name, open_checkpoint, read_latest
from lomo_ds.checkpoint.random_states import RandomStates
from lomo_ds.config.ds_fields import settle
from lomo_ds.config.lomo_config import idle_fields, read_lomo_config, refuse_what_cannot_be
from lomo_ds.distributed.collectives import all_reduce_sum, gather_objects
from lomo_ds.distributed.process_group import TIMEOUT, start_process_group
from lomo_ds.engine.batches import Batch
from lomo_ds.engine.build import build_optimizer
from lomo_ds.engine.client_arguments import (
    needs_metric,
    read_parameters,
    refuse_data,
    refuse_idle_scheduler,
    refuse_scheduler,
)
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.engine.engine_state import advance_scheduler, capture_engine, restore_engine, restore_weights
from lomo_ds.engine.items import LabelWatch
from lomo_ds.engine.loss import as_scalar
from lomo_ds.engine.lr_schedulers import build_scheduler
from lomo_ds.engine.optimizer import LomoOptimizer, ParameterGroups
from lomo_ds.engine.step_batch import StepBatch
from lomo_ds.errors import CheckpointError, ConfigError, one_line
from lomo_ds.update.schedules import Schedule
from lomo_ds.zero3.parameter_access import ParameterAccess

logger = logging.getLogger(__name__)


def initialize(
    args: Any = None,
    model: Module | None = None,
    optimizer: None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: None = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple["LomoEngine", LomoOptimizer, Any, Any]:
    """``deepspeed.initialize`` for LOMO: the same arguments, the same four values.

    Args:
        model: its parameters are split over the ranks, unless ``deepspeed.zero.Init`` has done so.
        optimizer, mpu, mesh_param: must be None; LOMO is named in ``config``, and its ranks are data-parallel.
        model_parameters: what to train, tensors or param groups with their own ``lr`` and ``weight_decay``.
        lr_scheduler: a function that builds one for the optimizer it is given; a scheduler that is built acts on
            another optimizer.
        config: an ordinary DeepSpeed config (path or dict) with ``"optimizer": {"type": "LOMO", ...}`` and ZeRO
            stage 3; see ``LomoConfig`` for the optimizer's parameters.

    Returns:
        (engine, optimizer, training dataloader or None, learning-rate scheduler or None)

    Raises:
        ConfigError: something was asked for that cannot be done.
    """
    shutdown_init_context()
    try:
        for name, value in (("optimizer", optimizer), ("mpu", mpu), ("mesh_param", mesh_param)):
            if value is not None:
                raise ConfigError(
                    f"lomo_ds.initialize takes no {name}, got {type(value).__name__}; name LOMO in the DeepSpeed "
                    "config, and leave every rank data-parallel"
                )
        if model is None:
            raise ConfigError("lomo_ds.initialize needs a model, got None")
        model_parameters = read_parameters(model, model_parameters)
        refuse_scheduler(lr_scheduler)
        refuse_data(training_data, collate_fn)
        ds_config = settle(_load_config(args, config, config_params))
        refuse_what_cannot_be(ds_config)
        _join_process_group(distributed_port, dist_init_required)
        ds_config = settle(ds_config, dist.get_world_size())
        refuse_what_cannot_be(ds_config)  # again, as accumulation may follow from the number of ranks
        if dist.get_rank() == 0 and (idle := idle_fields(ds_config)):
            logger.info("of the DeepSpeed config LOMO has no use for %s", ", ".join(idle))
        engine = LomoEngine(
            args=args,
            model=model,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=ds_config,
            config_class=parse_ds_config(ds_config),
        )
    finally:
        restore_init_context()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


class LomoEngine(DeepSpeedEngine):
    """A ``DeepSpeedEngine`` over ZeRO-3 in which no whole gradient outlives the hook that receives it."""

    optimizer: LomoOptimizer
    _in_train_batch = False

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next step; 1 unless training in fp16."""
        return self.optimizer.cur_scale

    @property
    def schedule(self) -> Schedule:
        """The update schedule in force."""
        return self.optimizer.schedule

    def train_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None = None) -> Tensor:
        """One whole optimizer step under any schedule: the step plain PyTorch would take on all ranks' batches at once.

        Args:
            batch: the keyword arguments of the model's forward; or a list of them, this rank's micro-batches. The
                counts of labelled tokens (labels other than -100) may differ between ranks and micro-batches; the
                number of micro-batches may not.
            num_items: how many items the loss is a mean over, for each micro-batch; None counts them, see ``items``.

        Returns:
            The model's loss averaged over the labelled tokens of the whole step, all ranks and micro-batches; 0-dim,
            float32. It is not finite where the step was skipped for that.

        Raises:
            ConfigError: several micro-batches under a schedule that keeps no gradients; a step begun with
                ``engine.backward`` is not finished; the batch names no arguments; the model returns no loss; or it is
                not known what losses weigh.
            PeerError: the model returns no loss on another rank.
        """
        step_batch = StepBatch(batch, num_items, self._labels, self.device, self._ranks)
        self._refuse_train_batch(len(step_batch))
        self._in_train_batch = True
        try:
            if self.schedule.passes == 2:
                self._backward_twice(step_batch)
            else:
                self._backward_all(step_batch)
            self.set_gradient_accumulation_boundary(True)
            self.step()
        except BaseException:
            self.optimizer.discard()
            raise
        finally:
            self._in_train_batch = False
            self._is_gradient_accumulation_boundary = None
        # step() has counted one micro-step; the step is a whole one, however many micro-batches it had
        self.micro_steps += self.gradient_accumulation_steps() - 1
        return torch.tensor(self.optimizer.loss, dtype=torch.float32, device=self.device)

    def _refuse_train_batch(self, micro_batches: int) -> None:
        self._refuse_step_without_metric(None)
        if micro_batches > 1 and not self.schedule.keeps_gradients:
            raise ConfigError(
                f"train_batch got {micro_batches} micro-batches, but this schedule keeps no gradients to add up; "
                "use update_schedule stash, or one larger micro-batch"
            )
        if self.optimizer.backward_passes:
            raise ConfigError(
                f"train_batch takes whole steps, but {self.optimizer.backward_passes} engine.backward of an unfinished "
                "step came before it; call engine.step() first"
            )

    def _backward_twice(self, step_batch: StepBatch) -> None:
        """Measure, agree, and if the step is sound, compute the same gradients again and update."""
        random_states = RandomStates.capture()
        self._backward_all(step_batch)
        if self.optimizer.skip_reason is None:
            coefficients = self.optimizer.agree_on_step()
            if self.optimizer.skip_reason is None:
                self.schedule.apply(coefficients)
                random_states.restore()  # the same dropout again
                self._backward_all(step_batch)

    def _backward_all(self, step_batch: StepBatch) -> None:
        """Forward and backward of each micro-batch, its loss weighted by its share of the step's labels."""
        is_first_pass = step_batch.share is None
        for position in range(len(step_batch)):
            loss = step_batch.forward(self, position)
            if step_batch.skip_reason is not None:
                return self.optimizer.skip_step(step_batch.skip_reason, step_batch.scale_is_to_blame)
            weight = step_batch.weight(position)
            if is_first_pass:
                self.optimizer.add_loss(loss.detach().double() * weight)
            self.set_gradient_accumulation_boundary(position == len(step_batch) - 1)
            # ranks' gradients are averaged: what is a share of the step is that times the ranks on each rank
            self.backward(loss * (weight * dist.get_world_size(self._ranks)), scale_wrt_gas=False)
        return None

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """``DeepSpeedEngine.backward``; the gradients of all ranks are averaged, as DeepSpeed's are.

        Raises:
            ConfigError: the schedule in force cannot do this, see ``train_batch``; or nothing can go backward from
                ``loss``.
        """
        loss = as_scalar(loss)
        if not self._in_train_batch:
            self._refuse_backward()
        if self.schedule.updates_in_backward and not self._in_train_batch:
            bad_losses = all_reduce_sum((~loss.detach().isfinite()).double(), self._ranks)
            if bad_losses.item():
                self.optimizer.skip_step("a loss was not finite")
                return loss / self.gradient_accumulation_steps()
        try:
            return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        except BaseException:
            self.optimizer.discard()
            raise

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """``DeepSpeedEngine.step``; says so where the step was skipped.

        Raises:
            ConfigError: the learning-rate scheduler needs a metric, and ``lr_kwargs`` has none.
        """
        skipped = self.skipped_steps
        self._refuse_step_without_metric(lr_kwargs)
        super().step(lr_kwargs)
        if self.skipped_steps > skipped and self.global_rank == 0:
            logger.warning(
                "step %d skipped, no weight was changed: %s (%d skipped so far, next loss scale %g)",
                self.global_steps, self.optimizer.last_skip_reason, self.skipped_steps, self.cur_scale,
            )  # fmt: skip

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        *,
        add_files: Callable[[Path], None] | None = None,
        then: Callable[[], None] | None = None,
        in_background: bool = False,
    ) -> bool:
        """Write the whole state of training as ``save_dir/tag``; every rank calls it, between steps.

        Args:
            tag: the folder's name, ``checkpoint-<step>`` by default.
            client_state: what the caller wants back from ``load_checkpoint``, as JSON; the same on every rank.
            save_latest: whether ``latest`` is to name it.
            add_files, then, in_background: see ``Saver.save``.

        Returns:
            True, as DeepSpeed's does.

        Raises:
            ConfigError: a step is under way, whose gradients no checkpoint holds.
            CheckpointError: ``tag`` is a path; or see ``Saver.save``.
        """
        if self.optimizer.backward_passes:
            raise ConfigError(
                f"save_checkpoint saves between steps, but {self.optimizer.backward_passes} engine.backward of an "
                "unfinished step came before it; call engine.step() first"
            )
        tag = tag or checkpoint_name(self.global_steps)
        if Path(tag).name != tag or tag == "..":
            raise CheckpointError(f"a checkpoint's tag must be the name of one folder in save_dir, got {tag!r}")
        self.saver.save(
            capture_engine(self, client_state),
            Path(save_dir) / tag,
            add_files,
            then,
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
        """Go on from the checkpoint ``load_dir/tag``, or the one that was saved there last; every rank calls it.

        The number of ranks may be another than the one that saved; weights are the same bit for bit then, and dropout
        and stochastic rounding draw other numbers.

        Args:
            load_module_strict: must be True: every tensor is loaded.
            load_optimizer_states: whether to go on with the saved dynamic loss scale and state of the update rule.
            load_lr_scheduler_states: whether to go on with the saved scheduler, its settings (a base learning rate,
                milestones) included, and learning rates; if not, this engine's stay as they are.
            load_module_only: load the weights, and nothing else.
            custom_load_fn: must be None.

        Returns:
            The folder and its ``client_state``; None and None where nothing was ever saved.

        Raises:
            LomoError: the checkpoint is damaged, or of another model or type of scheduler.
        """
        _refuse_partial_loading(load_module_strict, custom_load_fn)
        self.saver.wait()
        tag = tag or gather_objects(read_latest(Path(load_dir)), self.saver.group)[0]
        if tag is None:
            return None, None
        snapshot = capture_engine(self)
        found = open_checkpoint(Path(load_dir) / tag, snapshot.tensors, self.saver.group)
        if load_module_only:
            restore_weights(self, found, self.saver.group)
        else:
            restore_engine(self, found, self.saver.group, load_optimizer_states, load_lr_scheduler_states)
        return str(found.folder), found.record["client_state"]

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint that has been verified; every rank calls it.

        The learning rate is the one that this engine's own scheduler gives after as many steps.
        """
        restore_engine(self, found, self.saver.group, scheduler=False)
        advance_scheduler(self)

    @cached_property
    def saver(self) -> Saver:
        """Writes this engine's checkpoints; made by all ranks at once, at the first save or load."""
        return Saver(torch.distributed.new_group(backend="gloo", timeout=TIMEOUT))

    def destroy(self) -> None:
        """Take every hook off the model, and end what saves its checkpoints."""
        super().destroy()
        self._labels.remove()
        self._access.remove()
        if "saver" in vars(self):
            self.saver.close()
            del self.saver

    def _backward_prologue(self) -> None:
        if not self._in_train_batch:
            self._refuse_backward()
        self.optimizer.gathering.begin_backward()
        super()._backward_prologue()

    def _refuse_step_without_metric(self, lr_kwargs: dict[str, Any] | None) -> None:
        """DeepSpeed would give the scheduler the batch size in its place."""
        if needs_metric(self.lr_scheduler) and not lr_kwargs:
            raise ConfigError(
                f"{type(self.lr_scheduler).__name__} steps by a metric, which train_batch has none of; use another "
                "scheduler, or engine.backward(loss) and engine.step({'metrics': metric})"
            )

    def _refuse_backward(self) -> None:
        """DeepSpeed's idiom cannot always be followed; found here, ``loss.backward()`` is refused too."""
        if self.schedule.passes == 2:
            raise ConfigError(
                "update_schedule two_pass runs every batch forward and backward twice, which engine.backward cannot; "
                "call engine.train_batch(batch), or use update_schedule stash"
            )
        if not self.schedule.keeps_gradients and (
            self.optimizer.backward_passes or not self.is_gradient_accumulation_boundary()
        ):
            raise ConfigError(
                "several backward passes make one step, but update_schedule immediate keeps no gradients to add up; "
                "call engine.step() after each backward, or use update_schedule stash"
            )

    def zero_optimization_partition_weights(self) -> bool:
        """Whether weights are gathered for each use, and DeepSpeed must watch each use; see ``gathering.Resident``."""
        built = self.optimizer is not None
        return super().zero_optimization_partition_weights() and not (built and self.optimizer.gathering.resident)

    def _broadcast_model(self) -> None:
        """On one rank DeepSpeed would build a communicator for it."""
        if dist.get_world_size() > 1:
            super()._broadcast_model()

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return optimizer_name.lower() == "lomo"

    def _scheduler_from_config(self, optimizer: LomoOptimizer) -> Any:
        name = self.scheduler_name()
        return name and build_scheduler(name, self.scheduler_params(), optimizer.optimizer)

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self.client_lr_scheduler is not None:
            refuse_idle_scheduler(self.lr_scheduler, (self.basic_optimizer, self.optimizer))

    def _configure_optimizer(self, client_optimizer: None, model_parameters: list[Any]) -> None:
        lomo = read_lomo_config(self.config)
        self.basic_optimizer = ParameterGroups(model_parameters, lomo.lr, lomo.weight_decay)
        self.optimizer = build_optimizer(self, self.basic_optimizer, lomo)
        self._labels = LabelWatch(self.module)
        self._access = ParameterAccess(self.module)

    @property
    def _ranks(self) -> ProcessGroup:
        return self.seq_data_parallel_group


def _refuse_partial_loading(load_module_strict: bool, custom_load_fn: None) -> None:
    if not load_module_strict:
        raise ConfigError(
            "load_module_strict False is not supported, as each rank loads its own shards of every tensor; load into "
            "the model that was saved, or export the checkpoint and load that"
        )
    if custom_load_fn is not None:
        raise ConfigError(
            "custom_load_fn is not supported, as no rank ever holds a whole state_dict; export the checkpoint, change "
            "the exported model, and begin from that"
        )


def _join_process_group(distributed_port: int, dist_init_required: bool | None) -> None:
    if dist_init_required is not False and not torch.distributed.is_initialized():
        start_process_group()  # which needs no launcher, where DeepSpeed's own would look for MPI
    dist.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )


def _load_config(args: Any, config: Any, config_params: Any) -> dict[str, Any]:
    given = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    if len(given) != 1:
        raise ConfigError(f"give one DeepSpeed config, as config= or in args.deepspeed_config, got {len(given)}")
    if isinstance(given[0], dict):
        return given[0]
    try:
        loaded = load_ds_config(given[0])
    except Exception as error:  # whatever its JSON reader and its decoders raise
        raise ConfigError(f"the DeepSpeed config {one_line(given[0])} cannot be read: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the DeepSpeed config {one_line(given[0])} must hold a JSON object, got {type(loaded).__name__}"
        )
    return loaded
