"""Skipped steps: a bad loss or gradient, missing labels or an exception leave weights and state unchanged."""

import copy
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from transformers import get_scheduler

import lomo_ds
from lomo_ds.errors import NonFiniteGradientError
from tests.engines import identical, largest_difference, make_engine, my_part, weights_of
from tests.ranks import Ranks
from tests.reference import PlainSGD, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


def break_loss(engine: lomo_ds.LomoEngine, rank: int) -> Any:
    """Make the loss nan on one rank."""

    def poison(module: Any, inputs: Any, output: Any) -> Any:
        if dist.get_rank() == rank and module.training:
            output.loss = output.loss * math.nan
        return output

    return engine.module.register_forward_hook(poison)


def skip_bad_loss(schedule: str, by_idiom: bool) -> tuple[list[str], float]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lomo_ds").addHandler(handler)
    engine = make_engine(tiny_model(), schedule)
    batch = my_part(whole_batch(0, rows=4))
    before = weights_of(engine)
    broken = break_loss(engine, rank=1)
    if by_idiom:
        engine.backward(engine(**batch).loss)
        engine.step()
    else:
        assert math.isnan(engine.train_batch(batch))
    assert identical(before, weights_of(engine))
    assert (engine.global_steps, engine.skipped_steps) == (1, 1)
    assert not engine.was_step_applied()
    broken.remove()
    if by_idiom:
        engine.backward(engine(**batch).loss)
        engine.step()
    else:
        assert math.isfinite(engine.train_batch(batch))
    assert not identical(before, weights_of(engine))
    assert (engine.global_steps, engine.skipped_steps) == (2, 1)
    logging.getLogger("lomo_ds").removeHandler(handler)
    return [record for record in records if "skipped" in record], engine.get_global_grad_norm() or math.nan


@pytest.mark.parametrize(
    ("schedule", "by_idiom"),
    [("immediate", False), ("immediate", True), ("two_pass", False), ("stash", False), ("stash", True)],
)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing(ranks: GroupOf, schedule: str, by_idiom: bool) -> None:
    outcomes = ranks(2).run(skip_bad_loss, schedule, by_idiom)
    assert [len(records) for records, _ in outcomes] == [1, 0], "rank 0 tells it, once"
    assert all(math.isfinite(norm) for _, norm in outcomes)


def skip_bad_gradient(schedule: str) -> None:
    """Put inf into one gradient element on one rank, with a finite loss."""
    model = tiny_model()
    if dist.get_rank() == 1:
        model.gain.register_hook(lambda gradient: gradient * math.inf)
    engine = make_engine(model, schedule)
    before = weights_of(engine)
    batch = my_part(whole_batch(0, rows=4))
    if schedule == "immediate":
        with pytest.raises(NonFiniteGradientError, match="update_schedule stash"):
            engine.train_batch(batch)
        return
    engine.train_batch(batch)
    assert engine.skipped_steps == 1
    assert identical(before, weights_of(engine))


@pytest.mark.parametrize("schedule", ["immediate", "two_pass", "stash"])
def test_a_gradient_that_is_not_finite_on_one_rank(ranks: GroupOf, schedule: str) -> None:
    ranks(2).run(skip_bad_gradient, schedule)


def skip_without_labels() -> None:
    engine = make_engine(tiny_model(), "stash")
    before = weights_of(engine)
    batch = whole_batch(0, rows=1)
    engine.train_batch({**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert engine.skipped_steps == 1
    assert identical(before, weights_of(engine))


def test_a_step_without_labels_changes_nothing(ranks: GroupOf) -> None:
    ranks(2).run(skip_without_labels)


def rate_after_a_skipped_step() -> tuple[list[float], list[float]]:
    engine = make_engine(
        tiny_model(),
        "stash",
        lr_scheduler=lambda optimizer: get_scheduler("linear", optimizer, 4, num_training_steps=8),
    )
    batch = my_part(whole_batch(0, rows=4))
    engine.train_batch(batch)
    before = engine.get_lr()
    broken = break_loss(engine, rank=0)
    engine.train_batch(batch)
    broken.remove()
    return before, engine.get_lr()


def test_a_skipped_step_keeps_the_learning_rate(ranks: GroupOf) -> None:
    for before, after in ranks(2).run(rate_after_a_skipped_step):
        assert before == after == [pytest.approx(0.3 / 4)]


def after_an_exception(schedule: str, good_micro_batches: int) -> float:
    """Run a step whose forward fails after ``good_micro_batches`` others, and compare the next step with PyTorch."""
    model = tiny_model()
    reference = PlainSGD(copy.deepcopy(model), lr=0.3)
    engine = make_engine(model, schedule)
    batch = whole_batch(0, rows=2)
    forwards = itertools.count()

    def fail(*_: Any) -> None:
        if next(forwards) == good_micro_batches:
            raise RuntimeError("out of memory, say")

    failing = engine.module.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="say"):
        engine.train_batch([my_part(batch)] * (good_micro_batches + 1))
    failing.remove()
    reference.step(batch)
    engine.train_batch(my_part(batch))
    return largest_difference(weights_of(engine), reference.model)


@pytest.mark.parametrize(
    ("schedule", "good_micro_batches"), [("immediate", 0), ("two_pass", 0), ("stash", 0), ("stash", 1)]
)
def test_a_failed_step_leaves_nothing_behind(ranks: GroupOf, schedule: str, good_micro_batches: int) -> None:
    assert max(ranks(2).run(after_an_exception, schedule, good_micro_batches)) < 1e-6
