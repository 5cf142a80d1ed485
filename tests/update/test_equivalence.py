"""Equivalence: every supported combination takes the step of plain PyTorch on the batches of all ranks."""

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import deepspeed.comm as dist
import pytest

from lomo_ds.engine import build as schedule_builder
from tests.engines import WHOLE_THRESHOLD, largest_difference, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import PlainSGD, part, tiny_model, whole_batch

STEPS = 3  # DeepSpeed records the order of modules in the first step, and uses it to prefetch in the others
TOLERANCE = 1e-6
CLIPS: dict[str, dict[str, float]] = {
    "no clip": {},
    "value": {"value": 0.01},
    "group norm": {"group_norm": 0.05},
    "global norm": {"global_norm": 0.1},
}
SUPPORTED = [
    (schedule, clip, accumulation)
    for schedule, accumulation in (("immediate", 1), ("two_pass", 1), ("stash", 1), ("stash", 4))
    for clip in CLIPS
    if (schedule, clip) != ("immediate", "global norm")
]


@dataclass(frozen=True)
class EngineOptions:
    """Engine options that must not change the result."""

    checkpointing: str | None
    tied: bool
    threshold: int
    granularity: str
    offload: str = "none"


# every pair of values occurs in one of these six; world size 2 runs every other one, other world sizes run one
ENGINE_OPTIONS = [
    EngineOptions(None, tied=False, threshold=0, granularity="module"),
    EngineOptions(None, tied=True, threshold=WHOLE_THRESHOLD, granularity="layer"),
    EngineOptions("non-reentrant", tied=True, threshold=WHOLE_THRESHOLD, granularity="module"),
    EngineOptions("non-reentrant", tied=False, threshold=0, granularity="layer"),
    EngineOptions("reentrant", tied=False, threshold=WHOLE_THRESHOLD, granularity="module"),
    EngineOptions("reentrant", tied=True, threshold=0, granularity="layer"),
]


def train_both(schedule: str, clip: str, accumulation: int, options: EngineOptions) -> float:
    """Train the same model with an engine and with plain PyTorch; return the largest weight difference."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = tiny_model(tied=options.tied)
    reference = PlainSGD(copy.deepcopy(model), lr=0.3, weight_decay=0.1, **CLIPS[clip])
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
    limits = CLIPS[clip]
    engine = make_engine(
        model,
        schedule,
        options.threshold,
        accumulation,
        global_norm=limits.get("global_norm"),
        params={
            "weight_decay": 0.1,
            "clip_grad_value": limits.get("value"),
            "clip_group_norm": limits.get("group_norm"),
            "gather_granularity": options.granularity,
        },
        zero_optimization={
            "stage": 3,
            "stage3_param_persistence_threshold": options.threshold,
            "offload_param": {"device": options.offload},
        },
    )
    for step in range(STEPS):
        batch = whole_batch(step, rows=world_size * accumulation)
        loss, norm = reference.step(batch)
        rank_batch = part(batch, rank, world_size)
        micro_batches = [part(rank_batch, index, accumulation) for index in range(accumulation)]
        assert float(engine.train_batch(micro_batches)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    assert (engine.global_steps, engine.skipped_steps) == (STEPS, 0)
    difference = largest_difference(weights_of(engine), reference.model)
    engine.destroy()
    return difference


def train_in_all(combination: tuple[str, str, int], options: list[EngineOptions]) -> dict[str, float]:
    return {str(asdict(option)): train_both(*combination, option) for option in options}


@pytest.mark.parametrize(
    ("combination", "world_size"),
    [(combination, size) for index, combination in enumerate(SUPPORTED) for size in (1, 2, 3 + index % 2)],
    ids=lambda value: f"{value[0]}, {value[1]}, accumulation {value[2]}" if isinstance(value, tuple) else str(value),
)
def test_equals_plain_sgd(ranks: Callable[..., Ranks], world_size: int, combination: tuple[str, str, int]) -> None:
    index = world_size + SUPPORTED.index(combination)
    chosen = ENGINE_OPTIONS[index % 2 :: 2] if world_size == 2 else [ENGINE_OPTIONS[index % len(ENGINE_OPTIONS)]]
    for differences in ranks(world_size).run(train_in_all, combination, chosen):
        print(f"{world_size} ranks, {combination}: {max(differences.values()):.1e}")
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("schedule", ["immediate", "stash"])
def test_equals_plain_sgd_on_eight_ranks(ranks: Callable[..., Ranks], schedule: str) -> None:
    clip = "group norm" if schedule == "immediate" else "global norm"
    options = EngineOptions("non-reentrant", tied=True, threshold=0, granularity="layer")
    assert max(ranks(8).run(train_both, schedule, clip, 1, options)) < TOLERANCE


# the same options with offload; each combination and world size runs one of them
OFFLOADED = [replace(option, offload="cpu") for option in ENGINE_OPTIONS]


@pytest.mark.parametrize(
    ("world_size", "combination"),
    [(size, combination) for size in (1, 2) for combination in SUPPORTED]
    + [(4, combination) for combination in SUPPORTED[::3]],
    ids=str,
)
def test_equals_plain_sgd_with_parameters_in_host_memory(
    ranks: Callable[..., Ranks], world_size: int, combination: tuple[str, str, int]
) -> None:
    chosen = [OFFLOADED[(world_size + SUPPORTED.index(combination)) % len(OFFLOADED)]]
    for differences in ranks(world_size).run(train_in_all, combination, chosen):
        assert max(differences.values()) < TOLERANCE, differences


def train_with_everything_in_host_memory(accumulation: int) -> float:
    """Train with ``HostStash``, which an engine on the CPU would not choose."""
    build: Any = schedule_builder
    plain, build.Stash = build.Stash, build.HostStash
    try:
        return train_both("stash", "global norm", accumulation, OFFLOADED[0])
    finally:
        build.Stash = plain


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_plain_sgd_with_parameters_and_stash_in_host_memory(
    ranks: Callable[..., Ranks], world_size: int, accumulation: int
) -> None:
    assert max(ranks(world_size).run(train_with_everything_in_host_memory, accumulation)) < TOLERANCE


def train_on_two_nodes() -> float:
    """Train on ranks 0..3 as two nodes of two ranks, where LOCAL_RANK is not the rank."""
    before = dict(os.environ)
    os.environ |= {"LOCAL_RANK": str(dist.get_rank() % 2), "LOCAL_WORLD_SIZE": "2"}
    try:
        return train_both("stash", "global norm", 1, ENGINE_OPTIONS[0])
    finally:
        os.environ |= before


def test_equals_plain_sgd_on_two_nodes(ranks: Callable[..., Ranks]) -> None:
    assert max(ranks(4).run(train_on_two_nodes)) < TOLERANCE
