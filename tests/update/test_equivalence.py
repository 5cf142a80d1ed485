"""Equivalence: every rule takes the steps of plain PyTorch on the batches of all ranks, in every combination."""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import deepspeed.comm as dist
import pytest

from lomo_ds.engine import build_schedule as schedule_builder
from tests.engines import WHOLE_THRESHOLD
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch
from tests.update.rule_references import TRAININGS, difference, example_rules, is_example, plain_training, rule_engine

# DeepSpeed records the order of modules in the first step, and uses it to prefetch in the others
STEPS, STEPS_WITH_STATE = 3, 5
TOLERANCE = 1e-6
GroupOf = Callable[..., Ranks]
Combination = tuple[str, str, int]  # schedule, clip and accumulation steps
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
# what rules other than LOMO's run: schedules know no rule, so that a rule can only differ in how it uses gradients
EACH_SCHEDULE = [
    ("immediate", "no clip", 1),
    ("immediate", "value", 1),
    ("immediate", "group norm", 1),
    ("two_pass", "global norm", 1),
    ("stash", "global norm", 1),
    ("stash", "global norm", 4),
]


@dataclass(frozen=True)
class EngineOptions:
    """Engine options that must not change the result."""

    checkpointing: str | None
    tied: bool
    threshold: int
    granularity: str
    offload: str = "none"


# every pair of values occurs in one of these six; on two ranks LOMO runs every other one, other runs have one
ENGINE_OPTIONS = [
    EngineOptions(None, tied=False, threshold=0, granularity="module"),
    EngineOptions(None, tied=True, threshold=WHOLE_THRESHOLD, granularity="layer"),
    EngineOptions("non-reentrant", tied=True, threshold=WHOLE_THRESHOLD, granularity="module"),
    EngineOptions("non-reentrant", tied=False, threshold=0, granularity="layer"),
    EngineOptions("reentrant", tied=False, threshold=WHOLE_THRESHOLD, granularity="module"),
    EngineOptions("reentrant", tied=True, threshold=0, granularity="layer"),
]


@example_rules()
def train_both(name: str, combination: Combination, options: EngineOptions) -> float:
    """Train the same model with an engine and with plain PyTorch; return the largest weight difference."""
    schedule, clip, accumulation = combination
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = tiny_model(tied=options.tied)
    reference = plain_training(name, copy.deepcopy(model), **CLIPS[clip])
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
    limits = CLIPS[clip]
    engine = rule_engine(
        name,
        model,
        schedule,
        options.threshold,
        accumulation,
        global_norm=limits.get("global_norm"),
        params={
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
    steps = STEPS if name == "lomo" else STEPS_WITH_STATE
    for step in range(steps):
        batch = whole_batch(step, rows=2 * world_size * accumulation)
        loss, norm = reference.step(batch)
        rank_batch = part(batch, rank, world_size)
        micro_batches = [part(rank_batch, index, accumulation) for index in range(accumulation)]
        assert float(engine.train_batch(micro_batches)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    assert (engine.global_steps, engine.skipped_steps) == (steps, 0)
    largest = difference(name, engine, reference)
    engine.destroy()
    return largest


def train_in_all(name: str, combination: Combination, options: list[EngineOptions]) -> dict[str, float]:
    return {str(asdict(option)): train_both(name, combination, option) for option in options}


def runs() -> Iterator[tuple[str, Combination, int, list[EngineOptions]]]:
    """Yield the names of rules, with combinations, world sizes and options, which are spread over the combinations."""
    for index, combination in enumerate(SUPPORTED):
        for world_size in (1, 2, 3 + index % 2):
            number = world_size + index
            several = ENGINE_OPTIONS[number % 2 :: 2] if world_size == 2 else [option_of(number)]
            yield "lomo", combination, world_size, several
    for row, name in enumerate(name for name in TRAININGS if name != "lomo"):
        for column, combination in enumerate(EACH_SCHEDULE):
            sizes = [1 + (row + column) % 4] if is_example(name) else [1 + column % 2, 3 + column // 2 % 2]
            for number, world_size in enumerate(sizes):
                yield name, combination, world_size, [option_of(column - row + 3 * number)]


def option_of(number: int, offload: str = "none") -> EngineOptions:
    return replace(ENGINE_OPTIONS[number % len(ENGINE_OPTIONS)], offload=offload)


def run_id(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}, {value[1]}, accumulation {value[2]}"
    return "" if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("name", "combination", "world_size", "options"), list(runs()), ids=run_id)
def test_equals_plain_pytorch(
    ranks: GroupOf, name: str, combination: Combination, world_size: int, options: list[EngineOptions]
) -> None:
    for differences in ranks(world_size).run(train_in_all, name, combination, options):
        print(f"{name}, {world_size} ranks, {combination}: {max(differences.values()):.1e}")
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    ("name", "combination"),
    [
        ("lomo", ("immediate", "group norm", 1)),
        ("lomo", ("stash", "global norm", 1)),
        ("adalomo", ("immediate", "no clip", 1)),
        ("projected", ("stash", "global norm", 1)),
    ],
    ids=run_id,
)
def test_equals_plain_pytorch_on_eight_ranks(ranks: GroupOf, name: str, combination: Combination) -> None:
    options = EngineOptions("non-reentrant", tied=True, threshold=0, granularity="layer")
    assert max(ranks(8).run(train_both, name, combination, options)) < TOLERANCE


def offloaded_runs() -> Iterator[tuple[str, Combination, int]]:
    """Yield the names of rules, with combinations and world sizes, that train with parameters in host memory."""
    for index, combination in enumerate(SUPPORTED):
        for world_size in (1, 2, 4) if index % 3 == 0 else (1, 2):
            yield "lomo", combination, world_size
    for row, name in enumerate(name for name in TRAININGS if name != "lomo"):
        for column in [row] if is_example(name) else range(0, len(EACH_SCHEDULE), 2):
            yield name, EACH_SCHEDULE[column % len(EACH_SCHEDULE)], 1 + (row + column) % 3


@pytest.mark.parametrize(("name", "combination", "world_size"), list(offloaded_runs()), ids=run_id)
def test_equals_plain_pytorch_with_parameters_in_host_memory(
    ranks: GroupOf, name: str, combination: Combination, world_size: int
) -> None:
    options = option_of(world_size + SUPPORTED.index(combination), offload="cpu")
    assert max(ranks(world_size).run(train_both, name, combination, options)) < TOLERANCE


def train_with_everything_in_host_memory(name: str, accumulation: int) -> float:
    """Train with ``HostStash``, which an engine on the CPU would not choose."""
    build: Any = schedule_builder
    plain, build.Stash = build.Stash, build.HostStash
    try:
        return train_both(name, ("stash", "global norm", accumulation), option_of(0, offload="cpu"))
    finally:
        build.Stash = plain


@pytest.mark.parametrize(
    ("name", "accumulation", "world_size"),
    [("lomo", accumulation, size) for accumulation in (1, 4) for size in (1, 2)]
    + [(name, 1 + 3 * (row % 2), 1 + row // 2 % 2) for row, name in enumerate(TRAININGS) if name != "lomo"],
)
def test_equals_plain_pytorch_with_parameters_and_stash_in_host_memory(
    ranks: GroupOf, name: str, accumulation: int, world_size: int
) -> None:
    assert max(ranks(world_size).run(train_with_everything_in_host_memory, name, accumulation)) < TOLERANCE


def train_on_two_nodes() -> float:
    """Train on ranks 0..3 as two nodes of two ranks, where LOCAL_RANK is not the rank."""
    before = dict(os.environ)
    os.environ |= {"LOCAL_RANK": str(dist.get_rank() % 2), "LOCAL_WORLD_SIZE": "2"}
    try:
        return train_both("lomo", ("stash", "global norm", 1), ENGINE_OPTIONS[0])
    finally:
        os.environ |= before


def test_equals_plain_pytorch_on_two_nodes(ranks: GroupOf) -> None:
    assert max(ranks(4).run(train_on_two_nodes)) < TOLERANCE
