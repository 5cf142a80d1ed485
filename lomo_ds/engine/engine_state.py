"""Engine state: capture and restore everything that the next step depends on, and gather the full weights."""

import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed.comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter
from torch.optim.lr_scheduler import LambdaLR

from lomo_ds import zero3
from lomo_ds.checkpoint import Checkpoint, Snapshot, restore
from lomo_ds.checkpoint.random_states import all_random_states, restore_all_random_states
from lomo_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # attributes of DeepSpeedEngine
PAIRS_KEY = "<pairs>"
ROUNDING = "rounding."  # prefix of the names of ``RoundingNoise.state`` in a rank's state
# the part of a scheduler's state that holds its progress; everything else is its settings
PROGRESS_FIELDS = (
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
    """Capture the state between two steps: shards and buffers by reference, everything else as a copy.

    Args:
        client_state: the caller's data, as JSON.
    """
    persistent = engine.module.state_dict(keep_vars=True)
    record = {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "optimizer": engine.optimizer.state_dict(),
        "schedule": engine.optimizer.chosen_settings,
        "device_type": engine.device.type,
        "lr_scheduler_type": type(engine.lr_scheduler).__name__,
        "lr_scheduler": _encode_mappings(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else None,
        "client_state": client_state or {},
    }
    updater = engine.optimizer.schedule.updater
    noise = updater.noise.state() if updater.noise else {}
    return Snapshot(
        shards=zero3.shards(engine.module),
        buffers={name: buffer for name, buffer in engine.module.named_buffers() if name in persistent},
        state_shards=updater.states.shards(updater.process_group),
        replicated_state=updater.states.replicated(),
        rank_state=all_random_states() | {ROUNDING + name: state for name, state in noise.items()},
        record=json.loads(json.dumps(record)),  # a copy, because training continues during a background save
    )


def full_state_dict(model: Module, exclude_frozen: bool = False) -> dict[str, Any] | None:
    """Return the state dict of full tensors, in host memory, on rank 0; None on the others. Every rank must call this.

    Parameters are gathered one at a time. Names of one tied parameter share its tensor.

    Args:
        exclude_frozen: whether to leave out parameters that are not trained.
    """
    is_main = dist.get_rank() == 0
    copies: dict[int, Tensor] = {}
    full: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Parameter):
            full[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            continue
        if exclude_frozen and not value.requires_grad:
            continue
        if id(value) not in copies:
            with zero3.gathered([value]):
                copies[id(value)] = value.detach().to("cpu", copy=True) if is_main else value.new_empty(0)
        full[name] = copies[id(value)]
    return full if is_main else None


def restore_weights(engine: DeepSpeedEngine, checkpoint: Checkpoint, group: ProcessGroup) -> None:
    """Restore only the weights and buffers."""
    restore(checkpoint, capture_engine(engine), group, rule_state=False)
    engine.optimizer.reset_after_load()


def restore_engine(
    engine: DeepSpeedEngine, checkpoint: Checkpoint, group: ProcessGroup, optimizer: bool = True, scheduler: bool = True
) -> None:
    """Restore a state captured by ``capture_engine``; random states only if world size and device type are equal.

    Args:
        optimizer: whether to restore the loss scale, the state of the update rules and the noise of rounding.
        scheduler: whether to restore the scheduler's state and the learning rates.

    Raises:
        CheckpointError: the saved scheduler or the state of the update rules is of another type, or the number of
            param groups differs.
    """
    record, snapshot = checkpoint.record, capture_engine(engine)
    if scheduler:
        _validate_same_scheduler(checkpoint, snapshot.record)
    rank_state = restore(checkpoint, snapshot, group, rule_state=optimizer)
    for name in COUNTERS:
        setattr(engine, name, record["counters"][name])
    if scheduler:
        _restore_scheduler(engine, record, snapshot.record)
    if optimizer:
        engine.optimizer.load_loss_scale(record["optimizer"])
        engine.optimizer.load_update_number(record["optimizer"])
    engine.optimizer.reset_after_load()
    if rank_state and record["device_type"] == engine.device.type:
        restore_all_random_states(rank_state)
        noise = engine.optimizer.schedule.updater.noise
        if optimizer and noise is not None:
            noise.load_state({n.removeprefix(ROUNDING): s for n, s in rank_state.items() if n.startswith(ROUNDING)})
    elif engine.global_rank == 0:
        logger.info(
            "%s was saved by %d ranks on %s and resumes with %d on %s: same weights and data, different random numbers",
            checkpoint.folder, record["world_size"], record["device_type"],
            dist.get_world_size(engine.seq_data_parallel_group), engine.device.type,
        )  # fmt: skip


def advance_scheduler(engine: DeepSpeedEngine) -> None:
    """Advance the engine's scheduler, which has not stepped yet, to the engine's step count.

    Skipped steps do not count, because DeepSpeed's engine does not step the scheduler for them.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings(action="ignore"):  # torch warns that the optimizer has not stepped before
        for _ in range(engine.global_steps - engine.skipped_steps):
            engine.lr_scheduler.step()


def _validate_same_scheduler(checkpoint: Checkpoint, current_record: dict[str, Any]) -> None:
    saved = checkpoint.record
    if saved["lr_scheduler_type"] != current_record["lr_scheduler_type"]:
        raise CheckpointError(
            f"{checkpoint.folder} was saved with the learning-rate scheduler {saved['lr_scheduler_type']}, but this "
            f"run has {current_record['lr_scheduler_type']}; resume with the same scheduler, or with "
            "load_lr_scheduler_states=False, and then advance the new scheduler yourself"
        )
    saved_groups, current_groups = len(saved["optimizer"]["lr"]), len(current_record["optimizer"]["lr"])
    if saved_groups != current_groups:
        raise CheckpointError(
            f"{checkpoint.folder} holds the learning rates of {saved_groups} param groups, but this run has "
            f"{current_groups}; resume with the same groups, or with load_lr_scheduler_states=False"
        )


def _restore_scheduler(engine: DeepSpeedEngine, saved: dict[str, Any], current_record: dict[str, Any]) -> None:
    """Restore the scheduler's state and the learning rates; log the settings of this engine that are replaced."""
    engine.optimizer.load_learning_rates(saved["optimizer"])
    if engine.lr_scheduler is None:
        return
    engine.lr_scheduler.load_state_dict(_decode_mappings(saved["lr_scheduler"]))
    _recompute_learning_rates(engine.lr_scheduler)
    restored, current = _settings(saved["lr_scheduler"]), _settings(current_record["lr_scheduler"])
    replaced = [
        f"{name} {current.get(name)} by {value}" for name, value in restored.items() if current.get(name) != value
    ]
    if replaced and engine.global_rank == 0:
        logger.warning(
            "the saved learning-rate scheduler is restored, which replaces %s; load_lr_scheduler_states=False keeps "
            "this engine's settings", ", ".join(replaced),
        )  # fmt: skip


def _settings(state: Any) -> Any:
    """Return a scheduler's state, including nested schedulers, without the fields that hold progress."""
    if isinstance(state, dict):
        return {name: _settings(value) for name, value in state.items() if name not in PROGRESS_FIELDS}
    return [_settings(value) for value in state] if isinstance(state, list) else state


def _recompute_learning_rates(scheduler: Any) -> None:
    """Recompute the learning rates from the scheduler's position, because its state does not hold its function.

    They equal the saved ones bit for bit, unless the function has changed (warm-up length, total steps).
    """
    if isinstance(scheduler, LambdaLR):
        lambdas = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * function(scheduler.last_epoch) for base, function in lambdas]
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr
    elif getattr(scheduler, "last_batch_iteration", -1) >= 0:  # a DeepSpeed scheduler
        scheduler.step(scheduler.last_batch_iteration)


def _encode_mappings(state: Any) -> Any:
    """Convert ``state`` for JSON: a mapping whose keys are not strings (such as milestones) becomes a list of pairs."""
    if isinstance(state, Mapping):
        plain = {key: _encode_mappings(value) for key, value in state.items()}
        return plain if all(isinstance(key, str) for key in plain) else {PAIRS_KEY: list(map(list, plain.items()))}
    return [_encode_mappings(value) for value in state] if isinstance(state, list | tuple) else state


def _decode_mappings(state: Any) -> Any:
    """Undo ``_encode_mappings``, except that tuples stay lists."""
    if isinstance(state, dict):
        items = state[PAIRS_KEY] if PAIRS_KEY in state else state.items()
        return {key: _decode_mappings(value) for key, value in items}
    return [_decode_mappings(value) for value in state] if isinstance(state, list) else state
