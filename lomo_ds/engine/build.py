"""Builds LomoOptimizer from a DeepSpeed engine's settings: shards, rule, clipping, schedule and hooks."""

import logging
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScalerBase
from deepspeed.utils.timer import NoopTimer
from torch.nn import Module, Parameter

from lomo_ds import zero3
from lomo_ds.config.lomo_config import LomoConfig, optimizer_name
from lomo_ds.distributed.collectives import raise_on_all_ranks
from lomo_ds.engine.build_schedule import accumulation_dtype, build_schedule, communication_dtype, min_free_bytes
from lomo_ds.engine.optimizer import LomoOptimizer, ParameterGroups
from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import format_bytes, free_bytes
from lomo_ds.memory.host_memory import storage_bytes
from lomo_ds.models.layered import reason_not_layered
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.update.accumulation import AccumulationChoice, choose_accumulation, needs_layers
from lomo_ds.update.clipping import Clipping, clipping_groups
from lomo_ds.update.hooks import BackwardHooks
from lomo_ds.update.rules import RULES, Rule
from lomo_ds.update.target import Target
from lomo_ds.update.updater import Updater
from lomo_ds.zero3.gathering import (
    AHEAD_NUMEL,
    Gathering,
    OnDemandGathering,
    ResidentGathering,
    choose_granularity,
    default_overlap_comm,
    largest_gather_numel,
    prefetch_limits,
    prefetches_next_gather,
)
from lomo_ds.zero3.stores import DeviceStore, HostStore, NvmeStore, Store
from lomo_ds.zero3.wire import PlainWireFormat, QuantizedWireFormat

logger = logging.getLogger(__name__)


def build_optimizer(engine: DeepSpeedEngine, groups: ParameterGroups, lomo: LomoConfig) -> LomoOptimizer:
    """Partition the engine's model over its ranks, and install LOMO's backward hooks.

    Parameters that are not in ``groups`` are frozen.
    """
    options = {id(parameter): group for group in groups.param_groups for parameter in group["params"]}
    trained = _trained_parameters(engine.module, set(options))
    against_layered = reason_not_layered(engine.module)
    gathering = _build_gathering(engine, lomo, against_layered)
    accumulation = _choose_accumulation(engine, lomo, gathering, against_layered)
    shards = [zero3.Shard.of(name, parameter) for name, parameter in trained.items()]
    targets = [
        Target(shard.name, shard.shape, shard.start, shard.stop, group, options[id(parameter)])
        for shard, group, parameter in zip(shards, clipping_groups(list(trained)), trained.values(), strict=True)
    ]
    clipping = Clipping(lomo.clip_grad_value, lomo.clip_group_norm, engine.gradient_clipping() or None)
    updater = Updater(
        targets,
        _rules_of(targets, optimizer_name(engine.config)),
        _build_store(engine, shards),
        _build_noise(engine, lomo),
        engine.seq_data_parallel_group,
        engine.device,
    )
    accumulates = engine.gradient_accumulation_steps() > 1 and not accumulation.layered
    free = min_free_bytes(engine)
    choice, schedule = build_schedule(engine, updater, clipping, free, accumulates)
    _log_host_memory(engine, shards)
    return LomoOptimizer(
        groups=groups,
        gathering=gathering,
        hooks=BackwardHooks(
            list(trained.values()),
            targets,
            schedule,
            engine.seq_data_parallel_group,
            communication_dtype(engine),
            accumulation_dtype(engine),
        ),
        schedule=schedule,
        choice=choice,
        accumulation=accumulation,
        free_bytes=free,
        loss_scaler=_build_loss_scaler(engine),
        process_group=engine.seq_data_parallel_group,
    )


def _choose_accumulation(
    engine: DeepSpeedEngine, lomo: LomoConfig, gathering: Gathering, against_layered: str | None
) -> AccumulationChoice:
    choice = choose_accumulation(lomo.accumulation, against_layered, gathering.granularity)
    if engine.gradient_accumulation_steps() > 1 and engine.global_rank == 0:
        logger.info("accumulation %s: %s", lomo.accumulation, choice)
    return choice


def _build_gathering(engine: DeepSpeedEngine, lomo: LomoConfig, against_layered: str | None) -> Gathering:
    dtype = engine.get_data_types()[0]
    free_host = min_free_bytes(engine)[1]  # before any rank allocates host memory
    raise_on_all_ranks(
        lambda: zero3.split(engine.module, engine.config, dtype, free_host), engine.seq_data_parallel_group
    )
    if zero3.is_resident_config(engine.config) and zero3.is_resident(engine.module):
        return ResidentGathering(engine.module)
    layered = needs_layers(lomo.accumulation, engine.gradient_accumulation_steps(), against_layered)
    granularity = choose_granularity(lomo.gather_granularity, engine.module, min_free_bytes(engine)[0], layered)
    if engine.global_rank == 0:
        logger.info("gather_granularity %s: %s", lomo.gather_granularity, granularity)
    undo, stored_as_used, limits = _configure_gathering(engine, granularity)
    return OnDemandGathering(
        engine.module,
        granularity,
        undo,
        stored_as_used,
        **limits,
        overlap_comm=False,  # see ``install_gathering``, which has a stream of its own
        timers=engine.timers if engine.wall_clock_breakdown() else NoopTimer(),
        ds_config=engine.config,
        max_reuse_distance=engine.zero_max_reuse_distance(),
        param_persistence_threshold=engine.zero_param_persistence_threshold(),
        model_persistence_threshold=engine.zero_model_persistence_threshold(),
        dp_process_group=engine.seq_data_parallel_group,
        offload_param_config=engine.zero_offload_param(),
        zero_module_granularity_threshold=engine.zero_module_granularity_threshold(),
        log_trace_cache_warnings=engine.zero_log_trace_cache_warnings(),
    )


def _configure_gathering(engine: DeepSpeedEngine, granularity: str) -> tuple[Callable[[], None], bool, dict[str, Any]]:
    """Configure how shards are gathered.

    Returns:
        A function that undoes the changes to the model, whether shards are on the device in the dtype of the
        parameters, and DeepSpeed's limits for prefetched and live parameters.
    """
    prefetch_numel, live_numel = engine.zero_prefetch_bucket_size(), engine.zero_max_live_parameters()
    offload = zero3.offload_device(engine.config)
    if prefetches_next_gather(offload, granularity):
        largest = largest_gather_numel(engine.module, granularity)
        prefetch_numel, live_numel = prefetch_limits(prefetch_numel, live_numel, largest)
        prefetch_numel = _configured_or(engine, "prefetch_bucket_size", prefetch_numel)
        live_numel = _configured_or(engine, "max_live_parameters", live_numel)
    overlap = _configured_or(engine, "overlap_comm", default_overlap_comm(offload))
    ahead_numel = prefetch_numel + AHEAD_NUMEL if overlap else None
    exact = PlainWireFormat(engine.device, copies=offload == "cpu")
    quantized = _gathers_in_int8(engine)
    wire = QuantizedWireFormat(engine.device, exact.copies) if quantized else exact
    undo = zero3.install_gathering(engine.module, wire, exact, ahead_numel)
    stored_as_used = not (quantized or offload != "none" or zero3.uses_int8_weights(engine.config))
    limits = {"prefetch_bucket_size": prefetch_numel, "max_live_parameters": live_numel}
    return undo, stored_as_used, limits


def _gathers_in_int8(engine: DeepSpeedEngine) -> bool:
    """Return whether gathers quantize shards to int8; never on one rank, where nothing is communicated."""
    return engine.zero_quantized_weights() and dist.get_world_size(engine.seq_data_parallel_group) > 1


def _configured_or(engine: DeepSpeedEngine, name: str, default: int) -> int:
    """Return the value of ``name`` in the ds_config, or ``default`` if it is absent."""
    zero = engine.config["zero_optimization"]
    is_set = any(zero.get(key) is not None for key in (name, f"stage3_{name}"))
    return getattr(engine._config.zero_config, name) if is_set else default


def _build_store(engine: DeepSpeedEngine, shards: list[zero3.Shard]) -> Store:
    if zero3.offload_device(engine.config) == "cpu":
        return HostStore(shards, engine.device, gathered_is_lossy=_gathers_in_int8(engine))
    if zero3.offload_device(engine.config) == "nvme":
        return NvmeStore(shards, engine.device, gathered_is_lossy=_gathers_in_int8(engine))
    return DeviceStore(shards)


def _trained_parameters(model: Module, trained_ids: set[int]) -> dict[str, Parameter]:
    """Freeze the parameters whose id is not in ``trained_ids``, and return the others by name."""
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained_ids)
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        raise ConfigError("the model has no trainable parameters; set requires_grad to true for at least one")
    return trained


def _rules_of(targets: list[Target], default: str) -> dict[str, Rule]:
    """Return the rule of each target by its name: that of its param group's ``type``, or the ``default``.

    Args:
        default: name of an optimizer in lower case.

    Raises:
        ConfigError: a param group names an unknown optimizer.
    """
    rules = {name: build() for name, build in RULES.items()}
    chosen = {target.name: str(target.options.get("type", default)).lower() for target in targets}
    for name, optimizer in chosen.items():
        if optimizer not in rules:
            raise ConfigError(
                f"the type of a param group must be one of {', '.join(rules)}, got {optimizer!r} for {name}"
            )
    return {name: rules[optimizer] for name, optimizer in chosen.items()}


def _build_noise(engine: DeepSpeedEngine, lomo: LomoConfig) -> RoundingNoise | None:
    if lomo.rounding == "nearest":
        return None
    rank = dist.get_rank(engine.seq_data_parallel_group)
    return RoundingNoise(torch.Generator(engine.device).manual_seed(lomo.seed + rank))


def _log_host_memory(engine: DeepSpeedEngine, shards: list[zero3.Shard]) -> None:
    """Log the pinned host memory of a rank's parameters, once, on rank 0."""
    if zero3.offload_device(engine.config) == "cpu" and engine.global_rank == 0:
        pinned = format_bytes(storage_bytes(shard.storage for shard in shards))
        free = format_bytes(free_bytes()[1])
        logger.info("pinned host memory per rank: %s of parameters; %s per rank remain free", pinned, free)


def _build_loss_scaler(engine: DeepSpeedEngine) -> LossScalerBase:
    # at the smallest loss scale, training continues and logs every skipped step
    arguments = {**engine.dynamic_loss_scale_args(), "raise_error_at_min_scale": False}
    return CreateLossScaler(
        dtype=engine.get_data_types()[0],
        static_loss_scale=engine.loss_scale(),
        dynamic_scaling=engine.dynamic_loss_scale(),
        dynamic_loss_args=arguments,
    )
