"""Half precision: loss scaling through real overflows, and stochastic rounding in the engine."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import lomo_ds
from tests.engines import identical, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import PlainSGD, part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


def fp16_engine(schedule: str, model: Any = None, window: int = 1000, power: int = 8) -> lomo_ds.LomoEngine:
    # DeepSpeed calls fp16 unsupported on the CPU; it is correct there, only slow
    get_accelerator().is_fp16_supported = lambda: True
    section = {"enabled": True, "initial_scale_power": power, "loss_scale_window": window, "hysteresis": 1}
    return make_engine(model or tiny_model(), schedule, threshold=0, fp16=section)


def my_batch(step: int) -> dict[str, Tensor]:
    world_size = dist.get_world_size()
    return part(whole_batch(step, rows=2 * world_size), dist.get_rank(), world_size)


def injected_overflow(schedule: str) -> None:
    model = tiny_model()
    engine = fp16_engine(schedule, model)
    before = weights_of(engine)
    poison = engine.module.gain.register_hook(lambda g: g * (math.inf if dist.get_rank() == 1 else 1.0))
    engine.train_batch(my_batch(0))
    poison.remove()
    assert identical(before, weights_of(engine))
    assert (engine.skipped_steps, engine.cur_scale) == (1, 2.0**7)
    engine.train_batch(my_batch(0))
    assert not identical(before, weights_of(engine))
    assert (engine.skipped_steps, engine.cur_scale) == (1, 2.0**7)


@pytest.mark.parametrize("schedule", ["two_pass", "stash"])
def test_inf_on_one_rank_halves_the_scale_of_all(ranks: GroupOf, schedule: str) -> None:
    ranks(2).run(injected_overflow, schedule)


def natural_overflow(schedule: str) -> tuple[int, list[float]]:
    """Train with a loss scale of 2 ** 24, at which gradients exceed 65504, the largest fp16 number."""
    engine = fp16_engine(schedule, power=24)
    scales = []
    for step in range(16):
        before, skipped = weights_of(engine), engine.skipped_steps
        engine.train_batch(my_batch(step))
        assert identical(before, weights_of(engine)) == (engine.skipped_steps > skipped)
        scales.append(engine.cur_scale)
    return engine.skipped_steps, scales


@pytest.mark.parametrize("schedule", ["two_pass", "stash"])
def test_a_scale_that_is_too_large_falls_until_steps_succeed(ranks: GroupOf, schedule: str) -> None:
    for skipped, scales in ranks(2).run(natural_overflow, schedule):
        assert 0 < skipped < 16
        assert scales[:skipped] == [2.0 ** (23 - step) for step in range(skipped)]
        assert set(scales[skipped:]) == {scales[skipped - 1]}


def fall_and_grow(window: int) -> list[tuple[int, float]]:
    """Return (skipped steps, loss scale) after each step, starting from a scale that is too large."""
    engine = fp16_engine("stash", window=window, power=24)
    history = []
    for step in range(24):
        engine.train_batch(my_batch(step))
        history.append((engine.skipped_steps, engine.cur_scale))
    return history


def test_the_scale_doubles_after_its_window(ranks: GroupOf) -> None:
    for history in ranks(2).run(fall_and_grow, 3):
        changes = [(after[1] / before[1], after[0] > before[0]) for before, after in itertools.pairwise(history)]
        assert set(changes) == {(0.5, True), (1.0, False), (2.0, False)}, "halves with a skip, doubles without one"
        first_growth = next(index for index, (change, _) in enumerate(changes) if change == 2.0)
        steady = [skipped for _, skipped in changes[first_growth - 3 : first_growth]]
        assert steady == [False] * 3


def overflow_at_the_smallest_scale() -> tuple[int, float]:
    engine = fp16_engine("stash", power=1)
    engine.module.gain.register_hook(lambda gradient: gradient * math.inf)
    for step in range(4):
        engine.train_batch(my_batch(step))
    return engine.skipped_steps, engine.cur_scale


def test_overflow_at_the_smallest_scale_does_not_end_training(ranks: GroupOf) -> None:
    assert ranks(2).run(overflow_at_the_smallest_scale) == [(4, 1.0)] * 2


def no_labels_in_fp16() -> tuple[int, float]:
    engine = fp16_engine("stash")
    batch = my_batch(0)
    engine.train_batch({**batch, "labels": torch.full_like(batch["labels"], -100)})
    return engine.skipped_steps, engine.cur_scale


def test_a_step_without_labels_does_not_change_the_scale(ranks: GroupOf) -> None:
    assert ranks(2).run(no_labels_in_fp16) == [(1, 2.0**8)] * 2


LIMITS: dict[str, dict[str, float]] = {
    "no clip": {},
    "value": {"value": 0.05},
    "group norm": {"group_norm": 0.5},
    "global norm": {"global_norm": 1.0},
}


def half_precision_step(section: str, schedule: str, clip: str, accumulation: int) -> tuple[float, float]:
    """Return the step projected onto the fp32 step, relative to its length; and the norm relative to the fp32 norm."""
    get_accelerator().is_fp16_supported = lambda: True
    world_size, limits = dist.get_world_size(), LIMITS[clip]
    reference = PlainSGD(tiny_model(), lr=0.3, **limits)
    start = {name: parameter.detach().clone() for name, parameter in reference.model.named_parameters()}
    params = {"clip_grad_value": limits.get("value"), "clip_group_norm": limits.get("group_norm")}
    precision = {"enabled": True} | ({"initial_scale_power": 10} if section == "fp16" else {})
    sections: dict[str, Any] = {section: precision}
    engine = make_engine(tiny_model(), schedule, 0, accumulation, limits.get("global_norm"), params=params, **sections)
    batch = whole_batch(0, rows=2 * accumulation * world_size)
    _, norm = reference.step(batch)
    rank_batch = part(batch, dist.get_rank(), world_size)
    engine.train_batch([part(rank_batch, index, accumulation) for index in range(accumulation)])
    assert engine.skipped_steps == 0
    weights, expected = weights_of(engine), dict(reference.model.named_parameters())
    moved = [(weights[name].float() - start[name].to(weights[name].dtype).float()).flatten() for name in start]
    exact = [(expected[name].detach() - start[name]).flatten() for name in start]
    projection = sum(float(actual @ true) for actual, true in zip(moved, exact, strict=True))
    return projection / sum(float(true @ true) for true in exact), (engine.get_global_grad_norm() or 0.0) / norm


@pytest.mark.parametrize("clip", LIMITS)
@pytest.mark.parametrize(("schedule", "accumulation"), [("two_pass", 1), ("stash", 1), ("stash", 2)])
@pytest.mark.parametrize("section", ["fp16", "bf16"])
def test_half_precision_takes_the_step_of_fp32_on_average(
    ranks: GroupOf, section: str, schedule: str, accumulation: int, clip: str
) -> None:
    for projection, norm in ranks(2).run(half_precision_step, section, schedule, clip, accumulation):
        assert projection == pytest.approx(1.0, abs=0.03), "rounding errors are unbiased noise"
        assert norm == pytest.approx(1.0, rel=0.02), "unscaled, averaged, before clipping"


def train_in_bf16(seed: int, rounding: str) -> dict[str, Tensor]:
    params = {"seed": seed, "rounding": rounding}
    engine = make_engine(tiny_model(), "stash", params=params, bf16={"enabled": True})
    for step in range(3):
        engine.train_batch(my_batch(step))
    assert {weight.dtype for weight in weights_of(engine).values()} == {torch.bfloat16}
    return weights_of(engine)


def test_stochastic_rounding_repeats_for_the_same_seed(ranks: GroupOf) -> None:
    one, again, other = (ranks(2).run(train_in_bf16, seed, "stochastic")[0] for seed in (1, 1, 2))
    assert identical(one, again)
    assert not identical(one, other)


def test_auto_rounds_stochastically(ranks: GroupOf) -> None:
    auto, stochastic, nearest = (
        ranks(2).run(train_in_bf16, 1, rounding)[0] for rounding in ("auto", "stochastic", "nearest")
    )
    assert identical(auto, stochastic)
    assert not identical(auto, nearest)


def train_with_seed_one() -> dict[str, Tensor]:
    return train_in_bf16(1, "stochastic")


def test_all_ranks_hold_the_same_model(ranks: GroupOf) -> None:
    first, *others = ranks(3).run(train_with_seed_one)
    assert all(identical(first, other) for other in others)
