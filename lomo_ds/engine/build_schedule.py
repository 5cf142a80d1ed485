"""Chooses and builds the update schedule of an engine, from its settings and the memory that is free."""

import logging

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from lomo_ds.config.lomo_config import read_lomo_config
from lomo_ds.config.sections import value_at
from lomo_ds.distributed.collectives import gather_objects
from lomo_ds.memory.budget import format_bytes, free_bytes
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules import Choice, Schedule, choose_schedule
from lomo_ds.update.schedules.immediate import Immediate
from lomo_ds.update.schedules.stash import HostStash, Stash
from lomo_ds.update.schedules.two_pass import TwoPass
from lomo_ds.update.updater import Updater

logger = logging.getLogger(__name__)


def build_schedule(
    engine: DeepSpeedEngine, updater: Updater, clipping: Clipping, free: list[int], accumulates: bool
) -> tuple[Choice, Schedule]:
    """Choose and build the update schedule.

    Args:
        free: see ``min_free_bytes``.
        accumulates: whether it gets several gradients of each parameter in a step, which it must add up.

    Raises:
        ConfigError: the configured schedule cannot, or a stash does not fit.
    """
    lomo = read_lomo_config(engine.config)
    stash_dtype = torch.float32 if accumulates else communication_dtype(engine)
    stash_bytes = sum(t.numel for t in updater.targets) * (stash_dtype or engine.get_data_types()[0]).itemsize
    choice = choose_schedule(
        lomo,
        gradient_clipping=engine.gradient_clipping(),
        fp16=engine.fp16_enabled(),
        accumulation_steps=max(2, engine.gradient_accumulation_steps()) if accumulates else 1,
        stash_bytes=stash_bytes,
        free_device_bytes=free[0],
        free_host_bytes=free[1],
    )
    if engine.global_rank == 0:
        logger.info("update_schedule %s: %s; clipping: %s", lomo.update_schedule, choice, clipping)
        if choice.settings == {"update_schedule": "stash", "stash_device": "cpu"}:
            remaining = format_bytes(free_bytes()[1])
            logger.info(
                "pinned host memory per rank: %s of gradient shards; %s per rank remain free",
                format_bytes(stash_bytes),
                remaining,
            )
    return choice, _schedule_of(choice, updater, clipping, stash_dtype)


def min_free_bytes(engine: DeepSpeedEngine) -> list[int]:
    """Return the free bytes of the device and of a rank's share of host memory, each the minimum over all ranks."""
    return [min(values) for values in zip(*gather_objects(free_bytes(), engine.seq_data_parallel_group), strict=True)]


def communication_dtype(engine: DeepSpeedEngine) -> torch.dtype | None:
    """Return ``communication_data_type`` of the ds_config; None keeps the gradients' own dtype."""
    return engine.communication_data_type if engine._config.communication_data_type else None


def accumulation_dtype(engine: DeepSpeedEngine) -> torch.dtype | None:
    """Return float32 if ``grad_accum_dtype`` of the ds_config says so, else ``communication_dtype``."""
    is_set = value_at(engine.config, "data_types.grad_accum_dtype") is not None
    return torch.float32 if is_set else communication_dtype(engine)


def _schedule_of(choice: Choice, updater: Updater, clipping: Clipping, stash_dtype: torch.dtype | None) -> Schedule:
    """Build the schedule that ``choice`` selects; see ``Stash`` for ``stash_dtype``."""
    if choice.schedule == "immediate":
        return Immediate(updater, clipping)
    if choice.schedule == "two_pass":
        return TwoPass(updater, clipping)
    if choice.stash_device == "cpu" and updater.device.type != "cpu":
        return HostStash(updater, clipping, stash_dtype)
    return Stash(updater, clipping, stash_dtype)
