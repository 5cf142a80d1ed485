"""Everything that the next step of an engine depends on: captured for a checkpoint, and put back from one."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import deepspeed.comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.distributed import ProcessGroup

from lomo_ds import zero3
from lomo_ds.checkpoint import Checkpoint, Snapshot, restore
from lomo_ds.errors import CheckpointError
from lomo_ds.random_states import all_random_states, restore_all_random_states

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's
PAIRS = "<pairs>"


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
        of_rank=all_random_states() | {f"rule.{name}": state for name, state in rule.items()},
        record=json.loads(json.dumps(record)),  # training goes on while a save in the background writes it
    )


def restore_engine(engine: DeepSpeedEngine, found: Checkpoint, group: ProcessGroup) -> None:
    """Put back what ``capture_engine`` found on any number of ranks; random states only on as many as there were."""
    record, now = found.record, capture_engine(engine)
    if record["lr_scheduler_type"] != now.record["lr_scheduler_type"]:
        raise CheckpointError(
            f"{found.folder} was saved with the learning-rate scheduler {record['lr_scheduler_type']}, and this run "
            f"has {now.record['lr_scheduler_type']}; resume with the same one"
        )
    of_rank = restore(found, now, group)
    for name in COUNTERS:
        setattr(engine, name, record["counters"][name])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(_without_pairs(record["lr_scheduler"]))
    engine.optimizer.load_state_dict(record["optimizer"])
    if of_rank and record["device_type"] == engine.device.type:
        restore_all_random_states(of_rank)
        rule = {name.removeprefix("rule."): state for name, state in of_rank.items() if name.startswith("rule.")}
        engine.optimizer.schedule.rule.load_state(rule)
    elif engine.global_rank == 0:
        logger.info(
            "%s was saved by %d ranks on %s and goes on with %d on %s: the same weights and data, other random numbers",
            found.folder, record["world_size"], record["device_type"],
            dist.get_world_size(engine.seq_data_parallel_group), engine.device.type,
        )  # fmt: skip


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
