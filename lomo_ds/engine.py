"""LomoEngine: a DeepSpeed engine whose ZeRO-3 optimizer updates each parameter during backward.

``initialize`` and the idiom ``engine(...)``, ``engine.backward(loss)``, ``engine.step()`` are DeepSpeed's own;
``engine.train_batch`` is one whole optimizer step under any update schedule.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from deepspeed.utils.timer import NoopTimer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.utils.data import Dataset

from lomo_ds import loss as losses
from lomo_ds import zero3
from lomo_ds.backward import BackwardHooks
from lomo_ds.clipping import Clipping, clipping_groups
from lomo_ds.config import LomoConfig, parse_ds_config, read_lomo_config, refuse_what_cannot_be
from lomo_ds.distributed import agree, smallest
from lomo_ds.errors import ConfigError
from lomo_ds.optimizer import LomoOptimizer, ParameterGroups
from lomo_ds.rules import Rule, Sgd
from lomo_ds.schedules import Immediate, Schedule, Stash, Target, TwoPass, choose_schedule

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


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
        ds_config = _load_config(args, config, config_params)
        refuse_what_cannot_be(ds_config)
        dist.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
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
    """A ``DeepSpeedEngine`` over ZeRO-3 in which no gradient outlives the backward pass that made it."""

    optimizer: LomoOptimizer
    schedule_in_words: str  # what was chosen, and why
    _in_train_batch = False

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next step; 1 unless training in fp16."""
        return self.optimizer.cur_scale

    @property
    def schedule(self) -> Schedule:
        """The update schedule in force."""
        return self.optimizer.schedule

    def train_batch(self, batch: Batch | Sequence[Batch]) -> Tensor:
        """One whole optimizer step under any schedule: the step plain PyTorch would take on all ranks' batches at once.

        Args:
            batch: the keyword arguments of the model's forward; or a list of them, this rank's micro-batches. The
                counts of labelled tokens (labels other than -100) may differ between ranks and micro-batches; the
                number of micro-batches may not.

        Returns:
            The model's loss averaged over the labelled tokens of the whole step, all ranks and micro-batches; 0-dim,
            float32. It is nan or inf where the step was skipped for that.

        Raises:
            ConfigError: several micro-batches under a schedule that keeps no gradients.
        """
        micro_batches = [batch] if isinstance(batch, Mapping) else list(batch)
        if not micro_batches:
            raise ConfigError("train_batch needs at least one micro-batch, got an empty list")
        if len(micro_batches) > 1 and not self.schedule.keeps_gradients:
            raise ConfigError(
                f"train_batch got {len(micro_batches)} micro-batches, but this schedule keeps no gradients to add up; "
                "use update_schedule stash, or one larger micro-batch"
            )
        self._in_train_batch = True
        try:
            return self._train_batch([self._on_device(micro_batch) for micro_batch in micro_batches])
        finally:
            self._in_train_batch = False
            self._is_gradient_accumulation_boundary = None

    def _train_batch(self, micro_batches: list[Batch]) -> Tensor:
        counts = [losses.count_items(micro_batch, self._shifts_labels) for micro_batch in micro_batches]
        random_states = _random_states()
        self._backward_all(micro_batches, counts)
        if self.schedule.passes == 2 and not self.optimizer.abandoned:
            coefficients = self.optimizer.agree_on_step()
            if not self.optimizer.overflow:
                self.schedule.apply(coefficients)
                _restore_random_states(random_states)  # the same dropout again
                self._backward_all(micro_batches, counts)
        self.set_gradient_accumulation_boundary(True)
        self.step()
        # step() has counted one micro-step; the step is a whole one, however many micro-batches it had
        self.micro_steps += self.gradient_accumulation_steps() - 1
        return torch.tensor(self.optimizer.loss, dtype=torch.float32, device=self.device)

    def _backward_all(self, micro_batches: list[Batch], counts: list[int]) -> None:
        """Forward and backward of each micro-batch, its loss weighted by its share of the step's labels."""
        share = 0.0
        for position, (micro_batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
            loss = losses.loss_of(self(**(micro_batch if count else losses.with_any_labels(micro_batch))))
            if position == 0:
                share = self._share_of_one_item(sum(counts), loss.detach())
            if not share:
                self.optimizer.abandon()
                return
            self.optimizer.add_loss(loss.detach().double() * (count * share))
            self.set_gradient_accumulation_boundary(position == len(micro_batches) - 1)
            # ranks' gradients are averaged: what is a share of the step is that times the ranks on each rank
            self.backward(loss * (count * share * dist.get_world_size(self._ranks)), scale_wrt_gas=False)

    def _share_of_one_item(self, items: int, first_loss: Tensor) -> float:
        """One over the items of the whole step, all ranks; 0 if there are none, or if any rank's loss is not finite."""
        local = torch.stack(
            [torch.full_like(first_loss, items, dtype=torch.float64), (~first_loss.isfinite()).double()]
        )
        all_items, bad_losses = agree(local, self._ranks).tolist()
        return 1.0 / all_items if all_items and not bad_losses else 0.0

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """``DeepSpeedEngine.backward``; the gradients of all ranks are averaged, as DeepSpeed's are.

        Raises:
            ConfigError: ``two_pass`` is in force, which only ``train_batch`` can carry out.
        """
        if self.schedule.updates_in_backward and not self._in_train_batch:
            bad_losses = agree((~loss.detach().isfinite()).double(), self._ranks)
            if bad_losses.item():
                self.optimizer.abandon()
                return loss / self.gradient_accumulation_steps()
        return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """``DeepSpeedEngine.step``; says so where the step was skipped."""
        skipped = self.skipped_steps
        super().step(lr_kwargs)
        if self.skipped_steps > skipped and self.global_rank == 0:
            what = "gradient" if math.isfinite(self.optimizer.loss) else "loss"
            logger.warning(
                "step %d skipped: a %s was not finite; no weight was changed (%d skipped so far, next loss scale %g)",
                self.global_steps, what, self.skipped_steps, self.cur_scale,
            )  # fmt: skip

    def _backward_prologue(self) -> None:
        if self.schedule.passes == 2 and not self._in_train_batch:
            raise ConfigError(
                "update_schedule two_pass runs every batch forward and backward twice, which engine.backward cannot; "
                "call engine.train_batch(batch), or use update_schedule stash"
            )
        super()._backward_prologue()

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return optimizer_name.lower() == "lomo"

    def _configure_optimizer(self, client_optimizer: None, model_parameters: list[Any]) -> None:
        lomo = read_lomo_config(self.config)
        self.basic_optimizer = ParameterGroups(model_parameters, lomo.lr, lomo.weight_decay)
        self.optimizer = self._configure_zero_optimizer(self.basic_optimizer)

    def _configure_zero_optimizer(self, optimizer: ParameterGroups) -> LomoOptimizer:
        lomo = read_lomo_config(self.config)
        offload = self._partition_parameters()
        options = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        trained = {}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in options)
            if parameter.requires_grad:
                trained[name] = parameter
        shards = [zero3.Shard.of(name, parameter) for name, parameter in trained.items()]
        targets = [
            Target(shard.data, group, options[id(parameter)])
            for shard, group, parameter in zip(shards, clipping_groups(list(trained)), trained.values(), strict=True)
        ]
        clipping = Clipping(lomo.clip_grad_value, lomo.clip_group_norm, self.gradient_clipping() or None)
        schedule = self._build_schedule(lomo, targets, self._build_rule(lomo), clipping)
        self._shifts_labels = losses.shifts_labels(self.module)
        return LomoOptimizer(
            groups=optimizer,
            offload=offload,
            hooks=BackwardHooks(list(trained.values()), shards, schedule, self._communication_dtype()),
            schedule=schedule,
            clipping=clipping,
            loss_scaler=CreateLossScaler(
                dtype=self.get_data_types()[0],
                static_loss_scale=self.loss_scale(),
                dynamic_scaling=self.dynamic_loss_scale(),
                dynamic_loss_args=self.dynamic_loss_scale_args(),
            ),
            ranks=self._ranks,
        )

    @property
    def _ranks(self) -> ProcessGroup:
        return self.seq_data_parallel_group

    def _partition_parameters(self) -> DeepSpeedZeRoOffload:
        return DeepSpeedZeRoOffload(
            self.module,
            timers=self.timers if self.wall_clock_breakdown() else NoopTimer(),
            ds_config=self.config,
            overlap_comm=self.zero_overlap_comm(),
            prefetch_bucket_size=self.zero_prefetch_bucket_size(),
            max_reuse_distance=self.zero_max_reuse_distance(),
            max_live_parameters=self.zero_max_live_parameters(),
            param_persistence_threshold=self.zero_param_persistence_threshold(),
            model_persistence_threshold=self.zero_model_persistence_threshold(),
            dp_process_group=self._ranks,
            offload_param_config=self.zero_offload_param(),
            zero_module_granularity_threshold=self.zero_module_granularity_threshold(),
            log_trace_cache_warnings=self.zero_log_trace_cache_warnings(),
        )

    def _build_rule(self, lomo: LomoConfig) -> Rule:
        if lomo.rounding == "nearest":
            return Sgd()
        rank = dist.get_rank(self._ranks)
        return Sgd(generator=torch.Generator(self.device).manual_seed(lomo.seed + rank))

    def _build_schedule(self, lomo: LomoConfig, targets: list[Target], rule: Rule, clipping: Clipping) -> Schedule:
        accumulates = self.gradient_accumulation_steps() > 1
        dtype = torch.float32 if accumulates else None
        stash_bytes = sum(t.shard.numel() * (dtype or t.shard.dtype).itemsize for t in targets)
        free_device, free_host = smallest(torch.tensor(_free_bytes(), device=self.device), self._ranks).tolist()
        choice = choose_schedule(
            lomo, self._needs_whole_gradient(), accumulates, stash_bytes, int(free_device), int(free_host)
        )
        self.schedule_in_words = f"{choice.describe()} ({choice.reason})"
        if self.global_rank == 0:
            logger.info("update_schedule %s: %s", lomo.update_schedule, self.schedule_in_words)
        if choice.schedule == "immediate":
            return Immediate(targets, rule, clipping, self.device, self._ranks)
        if choice.schedule == "two_pass":
            return TwoPass(targets, rule, clipping, self.device)
        stash_device = self.device if choice.stash_device == "gpu" else torch.device("cpu")
        return Stash(targets, rule, clipping, self.device, stash_device, dtype)

    def _needs_whole_gradient(self) -> str | None:
        if self.gradient_clipping() > 0:
            return f"gradient_clipping {self.gradient_clipping()} needs the global norm before any update"
        if self.fp16_enabled():
            return "fp16 needs to know of overflow before any update"
        if self.gradient_accumulation_steps() > 1:
            return f"gradient_accumulation_steps {self.gradient_accumulation_steps()} needs gradients added up"
        return None

    def _communication_dtype(self) -> torch.dtype | None:
        """``communication_data_type`` of the ds_config, where it differs from what gradients are anyway."""
        return self.communication_data_type if self._config.communication_data_type else None

    def _on_device(self, batch: Batch) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def _load_config(args: Any, config: Any, config_params: Any) -> dict[str, Any]:
    given = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    if len(given) != 1:
        raise ConfigError(f"give one DeepSpeed config, as config= or in args.deepspeed_config, got {len(given)}")
    return given[0] if isinstance(given[0], dict) else load_ds_config(given[0])


def _free_bytes() -> list[int]:
    """Free memory of this rank's device, and its share of the host's available memory."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    return [int(get_accelerator().available_memory()), psutil.virtual_memory().available // ranks_here]


def _random_states() -> tuple[Tensor, Tensor]:
    """What dropout draws from, on the host and on the device."""
    return torch.get_rng_state(), get_accelerator().get_rng_state()


def _restore_random_states(states: tuple[Tensor, Tensor]) -> None:
    host, device = states
    torch.set_rng_state(host)
    get_accelerator().set_rng_state(device)
