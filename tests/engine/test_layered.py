"""Layered accumulation takes the steps of plain PyTorch on all rows, in every combination."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import deepspeed.comm as dist
import pytest

from tests.layered_models import layered_model, micro_batches, padded
from tests.ranks import Ranks
from tests.update.rule_references import difference, example_rules, plain_training, rule_engine

STEPS = 4
TOLERANCE = 1e-6
MICRO_BATCHES = 4
GroupOf = Callable[..., Ranks]
CLIPS: dict[str, dict[str, float]] = {
    "no clip": {},
    "value": {"value": 0.01},
    "group norm": {"group_norm": 0.05},
    "global norm": {"global_norm": 0.1},
}
COMBINATIONS = [
    (schedule, clip)
    for schedule in ("immediate", "two_pass", "stash")
    for clip in CLIPS
    if (schedule, clip) != ("immediate", "global norm")
]


@dataclass(frozen=True)
class Options:
    """Settings that must not change the result."""

    tied: bool = False
    frozen: tuple[str, ...] = ()
    threshold: int = 0
    recomputed: bool = False
    offload: str = "none"


OPTIONS = [
    Options(),
    Options(tied=True, threshold=100_000),
    Options(frozen=("up_proj", "layers.1."), recomputed=True),
    Options(frozen=("embed_tokens", "layers.0.self_attn"), threshold=100),
]


@example_rules()
def train_both(rule: str, schedule: str, clip: str, options: Options) -> float:
    """Train the same model with an engine and with plain PyTorch; return the largest weight difference."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = layered_model(options.tied, options.frozen)
    reference = plain_training(rule, copy.deepcopy(model).double(), **CLIPS[clip])
    if options.recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    limits = CLIPS[clip]
    engine = rule_engine(
        rule,
        model,
        schedule,
        options.threshold,
        MICRO_BATCHES,
        global_norm=limits.get("global_norm"),
        params={
            "accumulation": "layered",
            "clip_grad_value": limits.get("value"),
            "clip_group_norm": limits.get("group_norm"),
        },
        zero_optimization={
            "stage": 3,
            "stage3_param_persistence_threshold": options.threshold,
            "offload_param": {"device": options.offload},
        },
    )
    assert engine.schedule.__class__.__name__.lower() == schedule.replace("_", "")
    steps = STEPS
    for step in range(steps):
        batches = micro_batches(step, MICRO_BATCHES * world_size)
        loss, norm = reference.step(padded(batches))
        local = batches[rank * MICRO_BATCHES : (rank + 1) * MICRO_BATCHES]
        assert float(engine.train_batch(local)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    assert (engine.global_steps, engine.skipped_steps) == (steps, 0)
    largest = difference(rule, engine, reference)
    engine.destroy()
    return largest


def runs() -> Iterator[tuple[str, str, str, int, Options]]:
    """Yield rules, schedules, clips and world sizes, with options that are spread over them."""
    for index, (schedule, clip) in enumerate(COMBINATIONS):
        for world_size in (1, 2, 3 + index % 2):
            yield "lomo", schedule, clip, world_size, OPTIONS[(index + world_size) % len(OPTIONS)]
    for index, (schedule, clip) in enumerate(
        [("immediate", "no clip"), ("two_pass", "global norm"), ("stash", "global norm"), ("immediate", "group norm")]
    ):
        yield "adalomo", schedule, clip, 1 + index, OPTIONS[index]
        offload = ("cpu", "cpu", "cpu", "cpu")[index]
        yield "lomo", schedule, clip, 1 + index % 2, replace(OPTIONS[-index], offload=offload)


@pytest.mark.parametrize(("rule", "schedule", "clip", "world_size", "options"), list(runs()))
def test_equals_plain_pytorch(
    ranks: GroupOf, rule: str, schedule: str, clip: str, world_size: int, options: Options
) -> None:
    largest = max(ranks(world_size).run(train_both, rule, schedule, clip, options))
    print(f"{rule}, {schedule}, {clip}, {world_size} ranks, {asdict(options)}: {largest:.1e}")
    assert largest < TOLERANCE
