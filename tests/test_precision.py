"""Half precision: loss scaling through real overflows, and stochastic rounding in the engine."""

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
    # DeepSpeed asks whether fp16 is fast here; it is right, only slow
    get_accelerator().is_fp16_supported = lambda: True
    section = {"enabled": True, "initial_scale_power": power, "loss_scale_window": window, "hysteresis": 1}
    return make_engine(model or tiny_model(), schedule, threshold=0, fp16=section)


def my_batch(step: int) -> dict[str, Tensor]:
    world_size = dist.get_world_size()
    return part(whole_batch(step, rows=2 * world_size), dist.get_rank(), world_size)


def overflow_injected(schedule: str) -> None:
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
    ranks(2).run(overflow_injected, schedule)


def overflow_by_itself(schedule: str) -> tuple[int, list[float]]:
    """A scale of 2 ** 24 lifts gradients past 65504."""
    engine = fp16_engine(schedule, power=24)
    scales = []
    for step in range(16):
        before, skipped = weights_of(engine), engine.skipped_steps
        engine.train_batch(my_batch(step))
        assert identical(before, weights_of(engine)) == (engine.skipped_steps > skipped)
        scales.append(engine.cur_scale)
    return engine.skipped_steps, scales


@pytest.mark.parametrize("schedule", ["two_pass", "stash"])
def test_a_scale_too_large_comes_down_until_steps_succeed(ranks: GroupOf, schedule: str) -> None:
    for skipped, scales in ranks(2).run(overflow_by_itself, schedule):
        assert 0 < skipped < 16
        assert scales[:skipped] == [2.0 ** (23 - step) for step in range(skipped)]
        assert set(scales[skipped:]) == {scales[skipped - 1]}


def grow(window: int) -> list[float]:
    engine = fp16_engine("stash", window=window)
    scales = []
    for step in range(8):
        engine.train_batch(my_batch(step))
        scales.append(engine.cur_scale)
    return scales


def test_the_scale_doubles_after_its_window(ranks: GroupOf) -> None:
    for scales in ranks(2).run(grow, 3):
        assert scales == sorted(scales)
        assert scales[-1] == 2.0**10
        assert scales.count(2.0**9) == 3


def norm_and_step_in_fp16() -> None:
    model = tiny_model()
    reference = PlainSGD(tiny_model(), lr=0.3, global_norm=0.1)
    get_accelerator().is_fp16_supported = lambda: True
    engine = make_engine(model, "stash", global_norm=0.1, fp16={"enabled": True, "initial_scale_power": 10})
    whole = whole_batch(0, rows=2 * dist.get_world_size())
    _, norm = reference.step(whole)
    engine.train_batch(my_batch(0))
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=2e-2), "unscaled, averaged, before clipping"
    for name, weight in weights_of(engine).items():
        torch.testing.assert_close(
            weight.float(), dict(reference.model.named_parameters())[name].detach(), atol=2e-3, rtol=2e-3
        )


def test_fp16_takes_about_the_step_of_fp32(ranks: GroupOf) -> None:
    ranks(2).run(norm_and_step_in_fp16)


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
    auto, stochastic, nearest = (ranks(2).run(train_in_bf16, 1, how)[0] for how in ("auto", "stochastic", "nearest"))
    assert identical(auto, stochastic)
    assert not identical(auto, nearest)


def ranks_agree() -> dict[str, Tensor]:
    return train_in_bf16(1, "stochastic")


def test_all_ranks_hold_the_same_model(ranks: GroupOf) -> None:
    first, *others = ranks(3).run(ranks_agree)
    assert all(identical(first, other) for other in others)
