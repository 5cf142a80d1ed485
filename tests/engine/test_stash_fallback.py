"""Accumulation in the stash: for models, micro-batches and programs that layered accumulation is not for."""

import copy
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch

from lomo_ds.errors import ConfigError
from tests.engines import largest_difference, make_engine, weights_of
from tests.layered_models import layered_model, micro_batches, padded
from tests.ranks import Ranks
from tests.reference import PlainSGD, tiny_model

STEPS = 4
TOLERANCE = 1e-6
GroupOf = Callable[..., Ranks]


def idiom_after_train_batch() -> tuple[float, list[str]]:
    """Train with train_batch, then with engine.backward for each micro-batch; return the schedules too."""
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, accumulation=2)
    schedules = [type(engine.schedule).__name__]
    for step in range(STEPS):
        batches = micro_batches(step, 2, lengths=(12,))
        for batch in batches:
            batch["labels"] = batch["input_ids"].clone()  # the idiom averages losses, not tokens
        reference.step(padded(batches))
        if step < 2:
            engine.train_batch(batches)
            continue
        for batch in batches:
            engine.backward(engine(**batch).loss)
            engine.step()
        schedules.append(type(engine.schedule).__name__)
    assert engine.global_steps == STEPS
    return largest_difference(weights_of(engine), reference.model), schedules


def test_the_idiom_of_deepspeed_changes_to_a_stash(ranks: GroupOf) -> None:
    for largest, schedules in ranks(2).run(idiom_after_train_batch):
        assert largest < TOLERANCE
        assert schedules == ["Immediate", "Stash", "Stash"]


def train_batch_inside_a_step() -> float:
    """Call train_batch, with micro-batches that need a stash, between engine.backward and the end of its step."""
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, "stash", accumulation=2)
    batches = micro_batches(0, 2, lengths=(12,))
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    reference.step(padded(batches))
    engine.backward(engine(**batches[0]).loss)
    engine.step()
    with pytest.raises(ConfigError, match="must not run inside an unfinished step"):
        engine.train_batch([batches[0], batches[1] | {"use_cache": True}])
    engine.backward(engine(**batches[1]).loss)
    engine.step()
    return largest_difference(weights_of(engine), reference.model)


def test_a_refused_train_batch_leaves_an_unfinished_step_as_it_is(ranks: GroupOf) -> None:
    assert max(ranks(1).run(train_batch_inside_a_step)) < TOLERANCE


def refused_idiom() -> str:
    engine = make_engine(layered_model(), accumulation=2, params={"accumulation": "layered"})
    loss = engine(**micro_batches(0, 1)[0]).loss
    with pytest.raises(ConfigError) as refusal:
        engine.backward(loss)
    return str(refusal.value)


def test_the_idiom_is_refused_if_layered_accumulation_was_asked_for(ranks: GroupOf) -> None:
    (message,) = ranks(1).run(refused_idiom)
    assert "engine.backward got one of several micro-batches, but accumulation layered is not possible" in message


def unusual_batches(schedule: str, change: dict[str, Any], num_items: list[int] | None) -> tuple[str, float | str]:
    """Train two steps on micro-batches that cannot be joined on the last rank; return the schedule and the result."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, schedule, accumulation=2)
    for step in range(2):
        batches = micro_batches(step, 2 * world_size, lengths=(12,))
        for batch in batches:
            batch["labels"] = batch["input_ids"].clone()
        reference.step(padded(batches))
        local = batches[2 * rank : 2 * rank + 2]
        if rank == world_size - 1:
            local[1] |= change
        try:
            engine.train_batch(local, num_items)
        except ConfigError as error:
            return type(engine.schedule).__name__, str(error)
    return type(engine.schedule).__name__, largest_difference(weights_of(engine), reference.model)


ONES = torch.ones(2, 12, dtype=torch.int64)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("change", "num_items", "reason"),
    [
        ({"attention_mask": ONES}, None, "they do not all have the same arguments"),
        ({"use_cache": True}, None, "with use_cache they would see each other's keys and values"),
        ({}, [1, 1], "num_items are not the numbers of their labels"),
    ],
)
def test_micro_batches_that_cannot_be_joined_need_a_stash(
    ranks: GroupOf, world_size: int, change: dict[str, Any], num_items: list[int] | None, reason: str
) -> None:
    """``auto`` takes one; ``immediate`` says on every rank why it cannot."""
    for schedule in ("auto", "stash"):
        for used, largest in ranks(world_size).run(unusual_batches, schedule, change, num_items):
            assert used == "Stash"
            assert largest < TOLERANCE
    *others, (_, message) = ranks(world_size).run(unusual_batches, "immediate", change, num_items)
    assert "update_schedule immediate keeps no gradients" in message
    assert f"layered accumulation is not possible: {reason}" in message
    for _, message in others:
        assert "layered accumulation is not possible: " in message


def arguments_that_are_none() -> str:
    engine = make_engine(layered_model(), accumulation=2)
    one, other = micro_batches(0, 2)
    engine.train_batch([one | {"attention_mask": None}, other])
    return type(engine.schedule).__name__


def test_arguments_that_are_none_do_not_count(ranks: GroupOf) -> None:
    assert ranks(1).run(arguments_that_are_none) == ["Immediate"]


def unequal_numbers(schedule: str, can_be_joined: bool) -> float | str:
    """Train with one micro-batch on rank 0 and two on rank 1."""
    rank = dist.get_rank()
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, schedule, accumulation=2)
    batches = micro_batches(0, 3)
    reference.step(padded(batches))
    local = batches[:1] if rank == 0 else batches[1:]
    try:
        engine.train_batch(local if can_be_joined else [batch | {"use_cache": True} for batch in local])
    except ConfigError as error:
        return str(error)
    return largest_difference(weights_of(engine), reference.model)


def test_unequal_numbers_of_micro_batches(ranks: GroupOf) -> None:
    assert max(ranks(2).run(unequal_numbers, "auto", True)) < TOLERANCE
    for message in ranks(2).run(unequal_numbers, "auto", False):
        assert "every rank needs the same number of micro-batches" in message
        assert "got 1 on some rank and 2 on another" in message
    for message in ranks(2).run(unequal_numbers, "immediate", False):
        assert "update_schedule immediate keeps no gradients" in message


def model_with_shared_parameters() -> torch.nn.Module:
    model = layered_model()
    one, other = model.model.layers
    one.self_attn.q_proj.weight = other.self_attn.q_proj.weight
    return model


def refused_models(accumulation: str) -> list[str]:
    messages = []
    models = ((tiny_model(), "auto"), (layered_model(), "module"), (model_with_shared_parameters(), "auto"))
    for model, granularity in models:
        params = {"accumulation": accumulation, "gather_granularity": granularity}
        try:
            engine = make_engine(model, accumulation=2, params=params)
            messages.append(str(engine.optimizer.accumulation))
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_models_that_cannot_be_layered(ranks: GroupOf) -> None:
    for own_loss, by_module, shared in ranks(2).run(refused_models, "auto"):
        assert shared == "stash (its layers share parameters)"
        assert own_loss.startswith("stash (OddForCausalLM does not compute its loss like LlamaForCausalLM")
        assert by_module.startswith("stash (parameters are gathered by module")
    for own_loss, by_module, shared in ranks(2).run(refused_models, "layered"):
        assert shared.startswith("accumulation layered is not possible: its layers share parameters")
        assert own_loss.startswith("accumulation layered is not possible: OddForCausalLM")
        assert "use accumulation stash, or leave it out" in own_loss
        assert "leave one of the two out" in by_module
