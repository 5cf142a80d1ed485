"""Everything that the next step of an engine depends on: captured for a checkpoint, and put back from one."""

import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed.comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LambdaLR

from lomo_ds import zero3
from lomo_ds.checkpoint import Checkpoint, Snapshot, restore
from lomo_ds.checkpoint.random_states import all_random_states, restore_all_random_states
from lomo_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's
PAIRS = "<pairs>"
# of a scheduler's state, how far it has come, as opposed to how it was set up
POSITION = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "last_batch_iteration",
    "T_cur",
    "T_i",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
)


def capture_engine(engine: DeepSpeedEngine, client_state: dict[str, Any] | None = None) -> Snapshot:
    """The state between two steps: shards and buffers themselves, all else as it is now.

    Args:
        client_state: the caller's part of it, as JSON.
    """
    persistent = engine.module.state_dict(keep_vars=True)
    record = {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "optimizer": engine.optimizer.state_dict(),
        "schedule": engine.optimizer.choice.settings | {"gather_granularity": engine.optimizer.gathering.granularity},
        "device_type": engine.device.type,
        "lr_scheduler_type": type(engine.lr_scheduler).__name__,
        "lr_scheduler": _with_pairs(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else None,
        "client_state": client_state or {},
    }
    rule = engine.optimizer.schedule.rule.state()
    return Snapshot(
        shards=zero3.shards(engine.module),
        buffers={name: buffer for name, buffer in engine.module.named_buffers() if name in persistent},
        rank_state=all_random_states() | {f"rule.{name}": state for name, state in rule.items()},
        record=json.loads(json.dumps(record)),  # training goes on while a save in the background writes it
    )


def restore_weights(engine: DeepSpeedEngine, found: Checkpoint, group: ProcessGroup) -> None:
    """Put back the weights and buffers alone."""
    restore(found, capture_engine(engine), group)
    engine.optimizer.reset_after_load()


def restore_engine(
    engine: DeepSpeedEngine, found: Checkpoint, group: ProcessGroup, optimizer: bool = True, scheduler: bool = True
) -> None:
    """Put back what ``capture_engine`` found on any number of ranks; random states only on as many as there were.

    Args:
        optimizer: whether to put back the loss scale and the state of the update rule.
        scheduler: whether to put back the state of the scheduler, and the learning rates.

    Raises:
        CheckpointError: the scheduler that was saved is of another type than this engine's.
    """
    record, now = found.record, capture_engine(engine)
    if scheduler:
        _refuse_another_scheduler(found, now.record)
    rank_state = restore(found, now, group)
    for name in COUNTERS:
        setattr(engine, name, record["counters"][name])
    if scheduler:
        _restore_scheduler(engine, record, now.record)
    if optimizer:
        engine.optimizer.load_loss_scale(record["optimizer"])
    engine.optimizer.reset_after_load()
    if rank_state and record["device_type"] == engine.device.type:
        restore_all_random_states(rank_state)
        rule = {name.removeprefix("rule."): state for name, state in rank_state.items() if name.startswith("rule.")}
        if optimizer:
            engine.optimizer.schedule.rule.load_state(rule)
    elif engine.global_rank == 0:
        logger.info(
            "%s was saved by %d ranks on %s and goes on with %d on %s: the same weights and data, other random numbers",
            found.folder, record["world_size"], record["device_type"],
            dist.get_world_size(engine.seq_data_parallel_group), engine.device.type,
        )  # fmt: skip


def advance_scheduler(engine: DeepSpeedEngine) -> None:
    """Bring the engine's own scheduler, which has not stepped yet, to the step that the engine's counters name.

    Skipped steps do not count, as DeepSpeed's engine steps no scheduler then.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings(action="ignore"):  # torch's, that no optimizer has stepped before
        for _ in range(engine.global_steps - engine.skipped_steps):
            engine.lr_scheduler.step()


def _refuse_another_scheduler(found: Checkpoint, now: dict[str, Any]) -> None:
    saved = found.record
    if saved["lr_scheduler_type"] != now["lr_scheduler_type"]:
        raise CheckpointError(
            f"{found.folder} was saved with the learning-rate scheduler {saved['lr_scheduler_type']}, and this run has "
            f"{now['lr_scheduler_type']}; resume with the same one, or with load_lr_scheduler_states=False, and step "
            "the new one as often as it should have stepped"
        )
    then, here = len(saved["optimizer"]["lr"]), len(now["optimizer"]["lr"])
    if then != here:
        raise CheckpointError(
            f"{found.folder} holds the learning rates of {then} parameter groups, and this run has {here}; resume with "
            "the same groups, or with load_lr_scheduler_states=False"
        )


def _restore_scheduler(engine: DeepSpeedEngine, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Put back the scheduler's state and the learning rates; a setting of this engine's that is replaced is named."""
    engine.optimizer.load_learning_rates(saved["optimizer"])
    if engine.lr_scheduler is None:
        return
    engine.lr_scheduler.load_state_dict(_without_pairs(saved["lr_scheduler"]))
    _take_rates_of(engine.lr_scheduler)
    before, mine = _settings(saved["lr_scheduler"]), _settings(now["lr_scheduler"])
    replaced = [f"{name} {mine.get(name)} by {value}" for name, value in before.items() if mine.get(name) != value]
    if replaced and engine.global_rank == 0:
        logger.warning(
            "the saved learning-rate scheduler goes on, which replaces %s; load_lr_scheduler_states=False keeps this "
            "engine's", ", ".join(replaced),
        )  # fmt: skip


def _settings(state: Any) -> Any:
    """A scheduler's state, and those of schedulers within it, without how far they have come."""
    if isinstance(state, dict):
        return {name: _settings(value) for name, value in state.items() if name not in POSITION}
    return [_settings(value) for value in state] if isinstance(state, list) else state


def _take_rates_of(scheduler: Any) -> None:
    """Let the next step have the rate that the scheduler itself gives it, whose state holds a position and no function.

    It is the saved one, bit for bit, unless the function is another now: a warm-up's length, the total of steps.
    """
    if isinstance(scheduler, LambdaLR):
        lambdas = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * function(scheduler.last_epoch) for base, function in lambdas]
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr
    elif getattr(scheduler, "last_batch_iteration", -1) >= 0:  # DeepSpeed's
        scheduler.step(scheduler.last_batch_iteration)


def _with_pairs(state: Any) -> Any:
    """``state`` with every mapping written as JSON can: one whose keys are no strings (milestones, say) as pairs."""
    if isinstance(state, Mapping):
        plain = {key: _with_pairs(value) for key, value in state.items()}
        return plain if all(isinstance(key, str) for key in plain) else {PAIRS: list(map(list, plain.items()))}
    return [_with_pairs(value) for value in state] if isinstance(state, list | tuple) else state


def _without_pairs(state: Any) -> Any:
    """What ``_with_pairs`` was given, but for tuples."""
    if isinstance(state, dict):
        items = state[PAIRS] if PAIRS in state else state.items()
        return {key: _without_pairs(value) for key, value in items}
    return [_without_pairs(value) for value in state] if isinstance(state, list) else state
