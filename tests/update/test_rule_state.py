"""State of the update rules, for every rule: saved and cut anew, untouched by skipped steps, beside any weights."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import lomo_ds
from lomo_ds import zero3
from lomo_ds.errors import CheckpointError
from tests.engines import identical, my_part, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch
from tests.update.rule_references import EIGHT_BIT_STATE, TRAININGS, example_rules, plain_training, rule_engine

GroupOf = Callable[..., Ranks]
ROWS = 6  # of each step, on 1, 2 or 3 ranks
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},  # rounded stochastically
    "int8": {"params": {"weights": "int8"}},
}


def train(engine: lomo_ds.LomoEngine, steps: range) -> list[float]:
    """Train on this rank's parts of the batches of ``steps``, and return the losses."""
    return [float(engine.train_batch(my_part(whole_batch(step, ROWS)))) for step in steps]


def states_of(engine: lomo_ds.LomoEngine) -> dict[str, Tensor]:
    """Return a copy of all state of the rules on this rank, padding included."""
    storage = engine.schedule.updater.states.storage
    return {f"{name}:{key}": tensor.clone() for name, state in storage.items() for key, tensor in state.items()}


def full_states(engine: lomo_ds.LomoEngine) -> dict[str, Tensor]:
    """Return the full state of all parameters, on every rank."""
    updater = engine.schedule.updater
    states = {name: tensor.clone() for name, tensor in updater.states.replicated().items()}
    for shard in updater.states.shards(updater.process_group):
        full = torch.zeros(shard.shape.numel(), dtype=shard.data.dtype)
        full[shard.start : shard.stop] = shard.data
        parts: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(parts, (shard.start, shard.data.clone()))
        for start, part in parts:
            full[start : start + part.numel()] = part
        states[shard.name] = full
    return states


def shards_of(engine: lomo_ds.LomoEngine) -> dict[str, Tensor]:
    """Return a copy of this rank's weights."""
    return {shard.name: shard.data.clone() for shard in zero3.shards(engine.module)}


# saved, and loaded on any number of ranks


@example_rules()
def continue_training(name: str, folder: str, steps: range) -> list[dict[str, Tensor]]:
    """Load a checkpoint unless ``steps`` are the first, train and save; return the full states, and the weights."""
    engine = rule_engine(name, tiny_model(seed=steps.start), "immediate", threshold=25)
    if steps.start:
        engine.load_checkpoint(folder)
    loaded = full_states(engine)
    assert engine.schedule.updater.step == steps.start + 1
    train(engine, steps)
    engine.save_checkpoint(folder)
    return [loaded, full_states(engine), weights_of(engine)]


@pytest.mark.parametrize("name", [name for name in TRAININGS if name not in EIGHT_BIT_STATE])
@pytest.mark.usefixtures("one_thread")
def test_state_is_cut_anew_on_another_number_of_ranks(ranks: GroupOf, tmp_path: Path, name: str) -> None:
    reference = plain_training(name, tiny_model())
    saved: dict[str, Tensor] | None = None
    for world_size, steps in ((1, range(2)), (3, range(2, 3)), (2, range(3, 5))):
        for step in steps:
            reference.step(whole_batch(step, ROWS))
        expected = dict(reference.model.named_parameters())
        outcomes = ranks(world_size).run(continue_training, name, str(tmp_path), steps)
        for loaded, states, weights in outcomes:
            if saved is not None:
                assert loaded.keys() == saved.keys()
                assert identical(loaded, saved)
            assert identical(states, outcomes[0][1]), "replicated state is equal on all ranks"
            for key, weight in weights.items():
                largest = float((weight - expected[key].detach()).abs().max())
                assert largest < 1e-6, (world_size, key)
        saved = outcomes[0][1]


@example_rules()
def load_on_another_number(name: str, folder: str) -> str:
    """Return the error of loading with state, and check that the weights alone can be loaded."""
    engine = rule_engine(name, tiny_model(seed=1), "immediate")
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(folder)
    fresh = states_of(engine)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    assert identical(states_of(engine), fresh)
    train(engine, range(2, 3))
    return str(error.value)


@pytest.mark.parametrize("name", EIGHT_BIT_STATE)
def test_state_in_eight_bits_belongs_to_a_number_of_ranks(ranks: GroupOf, tmp_path: Path, name: str) -> None:
    ranks(1).run(continue_training, name, str(tmp_path), range(1))
    for message in ranks(3).run(load_on_another_number, name, str(tmp_path)):
        assert "resume on 1, or load with load_optimizer_states=False, which leaves the state unchanged" in message


@example_rules()
def resume(name: str, folder: str, precision: str, schedule: str) -> None:
    """Check that a run that was resumed goes on bit for bit as the one that was not stopped."""

    def build(seed: int) -> lomo_ds.LomoEngine:
        return rule_engine(name, tiny_model(seed=seed), schedule, **copy.deepcopy(PRECISIONS[precision]))

    running, resumed = build(seed=0), build(seed=1)
    train(running, range(2))
    running.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    assert identical(shards_of(resumed), shards_of(running))
    assert train(resumed, range(2, 4)) == train(running, range(2, 4))
    assert identical(shards_of(resumed), shards_of(running))
    assert identical(states_of(resumed), states_of(running))
    assert resumed.schedule.updater.step == running.schedule.updater.step == 5


@pytest.mark.parametrize(
    ("name", "precision", "world_size"),
    [(name, p, 1 + (row + i) % 2) for row, name in enumerate(TRAININGS) for i, p in enumerate(PRECISIONS)],
)
def test_resuming_is_bit_exact(ranks: GroupOf, tmp_path: Path, name: str, precision: str, world_size: int) -> None:
    schedule = "immediate" if precision == "bf16" else "stash"
    ranks(world_size).run(resume, name, str(tmp_path), precision, schedule)


@example_rules()
def load_from_another_rule(saved_by: str, name: str, folder: str) -> None:
    saving = rule_engine(saved_by, tiny_model(), "immediate")
    train(saving, range(2))
    saving.save_checkpoint(folder)
    engine = rule_engine(name, tiny_model(seed=1), "immediate")
    fresh, before = states_of(engine), weights_of(engine)
    with pytest.raises(CheckpointError, match=r"saved with another optimizer.* load_optimizer_states=False"):
        engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert identical(weights_of(engine), before)
    choices: list[dict[str, Any]] = [
        {"load_module_only": True},
        {"load_optimizer_states": False, "load_lr_scheduler_states": False},
    ]
    for only in choices:
        engine = rule_engine(name, tiny_model(seed=1), "immediate")
        engine.load_checkpoint(folder, **only)
        assert identical(weights_of(engine), weights_of(saving))
        assert identical(states_of(engine), fresh)
        assert engine.schedule.updater.step == 1
        assert engine.global_steps == (0 if "load_module_only" in only else 2)
        train(engine, range(2, 3))
        assert not identical(weights_of(engine), weights_of(saving))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_checkpoint_of_another_rule(ranks: GroupOf, tmp_path: Path, name: str) -> None:
    saved_by = "momentum" if name != "momentum" else "adalomo"
    ranks(1).run(load_from_another_rule, saved_by, name, str(tmp_path))


# skipped steps


@example_rules()
def skip_a_step(name: str, schedule: str) -> None:
    """Check that a step whose gradient overflows on one rank changes nothing."""
    get_accelerator().is_fp16_supported = lambda: True
    section = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": 1}
    engine = rule_engine(name, tiny_model(), schedule, fp16=section)
    train(engine, range(2))
    before, states = weights_of(engine), states_of(engine)
    poison = engine.module.gain.register_hook(lambda g: g * (math.inf if dist.get_rank() == 1 else 1.0))
    train(engine, range(2, 3))
    poison.remove()
    assert engine.skipped_steps == 1
    assert identical(before, weights_of(engine))
    assert identical(states, states_of(engine))
    assert engine.schedule.updater.step == 3
    train(engine, range(2, 3))
    assert engine.schedule.updater.step == 4
    assert not identical(before, weights_of(engine))
    assert not states or not identical(states, states_of(engine))


@pytest.mark.parametrize(("name", "schedule"), zip(TRAININGS, itertools.cycle(["stash", "two_pass"])))
def test_a_skipped_step_touches_no_state(ranks: GroupOf, name: str, schedule: str) -> None:
    ranks(2).run(skip_a_step, name, schedule)


# weights in other formats


@example_rules()
def losses(name: str, precision: str) -> list[float]:
    """Return the losses of 20 steps on one batch."""
    engine = rule_engine(name, tiny_model(), "immediate", **copy.deepcopy(PRECISIONS[precision]))
    batch = my_part(whole_batch(0, ROWS))
    return [float(engine.train_batch(batch)) for _ in range(20)]


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_fall_alike_in_all_formats(ranks: GroupOf, name: str) -> None:
    exact = ranks(1).run(losses, name, "fp32")[0]
    for precision in ("bf16", "int8"):
        rounded = ranks(1).run(losses, name, precision)[0]
        print(
            f"{name}: {exact[0]:.3f} to {exact[-1]:.3f} in fp32, {rounded[0]:.3f} to {rounded[-1]:.3f} in {precision}"
        )
        assert exact[0] - exact[-1] > 0.5
        assert rounded[0] - rounded[-1] == pytest.approx(exact[0] - exact[-1], rel=0.1)
