"""LomoEngine as users call it: DeepSpeed's idiom, reported values, error messages and learning rates."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.comm as dist
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler

import lomo_ds
from lomo_ds.errors import ConfigError
from tests.engines import identical, largest_difference, make_engine, my_part, weights_of
from tests.limits import HUNG
from tests.ranks import Ranks
from tests.reference import PlainSGD, even_batch, part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


# the idiom: engine(...), engine.backward(loss), engine.step()


def train_by_idiom(schedule: str, accumulation: int, torch_style: bool) -> float:
    model = tiny_model()
    reference = PlainSGD(copy.deepcopy(model), lr=0.3)
    engine = make_engine(model, schedule, accumulation=accumulation)
    for step in range(3):
        batch = even_batch(step, rows=dist.get_world_size() * accumulation)
        _, norm = reference.step(batch)
        for micro_step in range(accumulation):
            loss = engine(**part(my_part(batch), micro_step, accumulation)).loss
            if torch_style:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    assert engine.global_steps == 3
    return largest_difference(weights_of(engine), reference.model)


@pytest.mark.parametrize("torch_style", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize(("schedule", "accumulation"), [("immediate", 1), ("stash", 1), ("stash", 3)])
def test_idiom_equals_plain_sgd(ranks: GroupOf, schedule: str, accumulation: int, torch_style: bool) -> None:
    assert max(ranks(2).run(train_by_idiom, schedule, accumulation, torch_style)) < 1e-6


def idiom_under_two_pass() -> str:
    engine = make_engine(tiny_model(), "two_pass")
    with pytest.raises(ConfigError) as refusal:
        engine.backward(engine(**my_part(even_batch(0, rows=dist.get_world_size()))).loss)
    return str(refusal.value)


def test_idiom_is_refused_under_two_pass(ranks: GroupOf) -> None:
    for message in ranks(2).run(idiom_under_two_pass):
        assert "two_pass" in message
        assert "engine.train_batch(batch)" in message


def two_backwards_one_step(by_boundary: bool) -> str:
    engine = make_engine(tiny_model(), "immediate")
    batch = my_part(even_batch(0, rows=dist.get_world_size()))
    if by_boundary:
        engine.set_gradient_accumulation_boundary(False)
    else:
        engine.backward(engine(**batch).loss)
    with pytest.raises(ConfigError) as refusal:
        engine.backward(engine(**batch).loss)
    return str(refusal.value)


@pytest.mark.parametrize("by_boundary", [False, True])
def test_immediate_refuses_several_backwards_in_a_step(ranks: GroupOf, by_boundary: bool) -> None:
    assert "call engine.step() after each backward" in ranks(2).run(two_backwards_one_step, by_boundary)[0]


def train_batch_in_an_open_step() -> str:
    engine = make_engine(tiny_model(), "stash", accumulation=2)
    batch = my_part(even_batch(0, rows=dist.get_world_size()))
    engine.backward(engine(**batch).loss)
    with pytest.raises(ConfigError) as refusal:
        engine.train_batch(batch)
    return str(refusal.value)


def test_train_batch_takes_whole_steps(ranks: GroupOf) -> None:
    assert "call engine.step() first" in ranks(2).run(train_batch_in_an_open_step)[0]


class SharedBetweenCheckpoints(torch.nn.Module):
    """A model with one layer in two reentrant checkpoints, so that its gradient arrives twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4)
        self.shared = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for _ in range(2):
            hidden = checkpoint(self.shared, hidden, use_reentrant=True)
        return hidden.square().mean()


def gradient_that_arrives_twice(schedule: str) -> float | str:
    model = SharedBetweenCheckpoints()
    reference = copy.deepcopy(model)
    engine = make_engine(model, schedule, threshold=0)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    try:
        engine.train_batch({"x": x[dist.get_rank()].unsqueeze(0)})
    except ConfigError as refusal:
        return str(refusal)
    reference(x).backward()
    torch.optim.SGD(reference.parameters(), lr=0.3).step()
    return largest_difference(weights_of(engine), reference)


def test_a_parameter_whose_gradient_arrives_twice(ranks: GroupOf) -> None:
    assert max(ranks(2).run(gradient_that_arrives_twice, "stash")) < 1e-6
    for schedule in ("immediate", "two_pass"):
        for message in ranks(2).run(gradient_that_arrives_twice, schedule):
            assert "shared." in message
            assert "use update_schedule stash" in message


def more_micro_batches_than_configured() -> float:
    """Accumulate many gradients in bf16 training, where a bf16 sum would lose small contributions."""
    model = tiny_model()
    engine = make_engine(model, "stash", bf16={"enabled": True})
    engine.train_batch([even_batch(step, 1) for step in range(8)])
    stash: Any = engine.schedule
    assert not stash.stashed
    engine.backward(engine(**even_batch(0, 1)).loss)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(**even_batch(1, 1)).loss)
    return float({held.dtype for held in stash.stashed.values()} == {torch.float32})


def test_gradients_accumulate_in_fp32(ranks: GroupOf) -> None:
    assert ranks(2).run(more_micro_batches_than_configured) == [1.0, 1.0]


def several_micro_batches(schedule: str) -> str:
    engine = make_engine(tiny_model(), schedule)
    with pytest.raises(ConfigError) as refusal:
        engine.train_batch([even_batch(0, 1), even_batch(1, 1)])
    return str(refusal.value)


@pytest.mark.parametrize("schedule", ["immediate", "two_pass"])
def test_several_micro_batches_need_a_stash(ranks: GroupOf, schedule: str) -> None:
    assert "2 micro-batches" in ranks(1).run(several_micro_batches, schedule)[0]


# results and error messages of initialize


def returned_values() -> None:
    dataset = [even_batch(step, 1)["input_ids"][0] for step in range(16)]
    engine, optimizer, loader, scheduler = lomo_ds.initialize(
        model=tiny_model(),
        training_data=dataset,  # type: ignore[arg-type]
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "LOMO", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 8}},
        },
    )
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert optimizer is engine.optimizer
    assert len(loader) == 4
    rates = []
    for ids in loader:
        rates.append(engine.get_lr()[0])
        engine.train_batch({"input_ids": ids, "labels": ids})
    assert 0 == rates[0] < rates[-1] <= 0.1
    assert scheduler.last_batch_iteration == 3
    assert engine.module.training


def test_initialize_returns_the_values_of_deepspeed(ranks: GroupOf) -> None:
    ranks(2).run(returned_values)


@pytest.mark.parametrize("name", ["optimizer", "mpu", "mesh_param"])
def test_initialize_refuses_unsupported_arguments(name: str) -> None:
    with pytest.raises(ConfigError, match=f"takes no {name}"):
        lomo_ds.initialize(model=tiny_model(), config={}, **{name: object()})  # type: ignore[arg-type]


def nothing_to_train() -> str:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ConfigError) as refusal:
        make_engine(model)
    return str(refusal.value)


def test_initialize_needs_trainable_parameters(ranks: GroupOf) -> None:
    for message in ranks(2).run(nothing_to_train):
        assert "the model has no trainable parameters" in message


def test_initialize_needs_one_config() -> None:
    with pytest.raises(ConfigError, match=r"give one DeepSpeed config.*got 0"):
        lomo_ds.initialize(model=tiny_model())


def schedule_and_log(sections: dict[str, Any]) -> tuple[str, list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lomo_ds")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    engine = make_engine(tiny_model(), **sections)
    logger.removeHandler(handler)
    return type(engine.schedule).__name__, records


@pytest.mark.parametrize(
    ("sections", "schedule"),
    [({}, "Immediate"), ({"global_norm": 1.0}, "Stash"), ({"accumulation": 2}, "Stash")],
)
def test_auto_is_resolved_and_logged_once(ranks: GroupOf, sections: dict[str, Any], schedule: str) -> None:
    (chosen, records), (also, silent) = ranks(2).run(schedule_and_log, sections)
    assert (chosen, also, silent) == (schedule, schedule, [])
    granularity, *accumulation, update_schedule = records
    assert granularity == "gather_granularity auto: layer"
    own_loss = "accumulation auto: stash (OddForCausalLM does not compute its loss like LlamaForCausalLM: "
    assert [message.startswith(own_loss) for message in accumulation] == [True] * ("accumulation" in sections)
    assert update_schedule.startswith(f"update_schedule auto: {schedule.lower()}")
    limit = "the global gradient norm to 1 (gradient_clipping)" if "global_norm" in sections else "none"
    assert update_schedule.endswith(f"; clipping: {limit}")


def events_of_deepspeeds_tensorboard(folder: str) -> None:
    section = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = make_engine(tiny_model(), tensorboard=section)
    for step in range(3):
        engine.train_batch(my_part(even_batch(step, rows=2)))
    if dist.get_rank() == 0:
        engine.monitor.tb_monitor.summary_writer.flush()


def test_deepspeeds_own_tensorboard_section(ranks: GroupOf, tmp_path: Path) -> None:
    ranks(2).run(events_of_deepspeeds_tensorboard, str(tmp_path))
    events = EventAccumulator(str(tmp_path / "job")).Reload()
    assert [event.value for event in events.Scalars("Train/Samples/lr")] == pytest.approx([0.3] * 3)


# weights at the start


def initialize_with_own_weights(offload: str) -> None:
    """Check that each rank starts with the weights of rank 0, which are broadcast once."""
    model, expected = tiny_model(seed=dist.get_rank()), tiny_model(seed=0)
    broadcast, sizes = dist.broadcast, []

    def counted(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(tensor.nbytes)
        return broadcast(tensor, *arguments, **keywords)

    with mock.patch.object(dist, "broadcast", counted):
        engine = make_engine(model, threshold=25, zero_optimization={"stage": 3, "offload_param": {"device": offload}})
    assert largest_difference(weights_of(engine), expected) == 0
    assert sum(sizes) == sum(parameter.nbytes for parameter in expected.parameters())


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_all_ranks_start_with_the_weights_of_rank_0(ranks: GroupOf, offload: str) -> None:
    ranks(3).run(initialize_with_own_weights, offload)


# learning rates


def follow_scheduler(name: str) -> None:
    model = tiny_model()
    reference = PlainSGD(copy.deepcopy(model), lr=0.3)
    scheduler = get_scheduler(name, reference.optimizers[0], num_warmup_steps=2, num_training_steps=6)
    engine = make_engine(
        model, "stash", lr_scheduler=lambda optimizer: get_scheduler(name, optimizer, 2, num_training_steps=6)
    )
    for step in range(5):
        batch = whole_batch(step, rows=2)
        assert engine.get_lr() == scheduler.get_last_lr()
        reference.step(batch)
        scheduler.step()
        engine.train_batch(my_part(batch))
    assert largest_difference(weights_of(engine), reference.model) < 1e-6


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_learning_rate_schedules(ranks: GroupOf, name: str) -> None:
    ranks(2).run(follow_scheduler, name)


def torch_scheduler_of_the_config() -> list[float]:
    engine = make_engine(tiny_model(), scheduler={"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}})
    engine.train_batch(my_part(whole_batch(0, rows=2)))
    return engine.get_lr()


def test_a_scheduler_of_torch_named_in_the_config(ranks: GroupOf) -> None:
    assert ranks(2).run(torch_scheduler_of_the_config) == [[0.15], [0.15]]


def two_parameter_groups() -> None:
    model = tiny_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "LOMO", "params": {"lr": 0.3}},
    }
    groups = [{"params": norms, "lr": 0.0}, {"params": [model.gain]}]
    engine = lomo_ds.initialize(model=model, model_parameters=groups, config=config)[0]
    engine.train_batch(my_part(whole_batch(0, rows=2)))
    changed = {name for name, weight in weights_of(engine).items() if not torch.equal(weight, before[name])}
    assert changed == {"gain"}
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_only_listed_parameters_train_each_at_its_own_rate(ranks: GroupOf) -> None:
    ranks(2).run(two_parameter_groups)


# dropout: both passes must use the same mask


def train_with_dropout(schedule: str, checkpointing: bool) -> dict[str, Tensor]:
    model = tiny_model(dropout=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = make_engine(model, schedule, global_norm=0.1)
    torch.manual_seed(7 + dist.get_rank())
    for step in range(3):
        engine.train_batch(my_part(whole_batch(step, rows=2)))
    return weights_of(engine)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_use_the_same_dropout(ranks: GroupOf, checkpointing: bool) -> None:
    stash, two_pass = (ranks(2).run(train_with_dropout, how, checkpointing)[0] for how in ("stash", "two_pass"))
    assert identical(stash, two_pass)


# destroy


def train_after_destroy() -> None:
    model = tiny_model()
    first = make_engine(model, "immediate")
    first.destroy()
    second = make_engine(model, "immediate")
    reference = PlainSGD(tiny_model(), lr=0.3)
    batch = whole_batch(0, rows=2)
    reference.step(batch)
    second.train_batch(my_part(batch))
    assert largest_difference(weights_of(second), reference.model) < 1e-6


def test_destroy_removes_the_hooks(ranks: GroupOf) -> None:
    ranks(2).run(train_after_destroy)


# without a launcher

NOTEBOOK = """
import torch
import lomo_ds

class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        return (self.linear(x) - y).square().mean()

config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3},
          "optimizer": {"type": "LOMO", "params": {"lr": 0.1}}}
engine, *_ = lomo_ds.initialize(model=Regression(), config=config)
x = torch.eye(3)
print("losses", *(float(engine.train_batch({"x": x, "y": x.sum(dim=1, keepdim=True)})) for _ in range(9)))
"""


def test_a_custom_model_in_one_process_without_launcher() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment["MASTER_PORT"] = "29613"
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, env=environment, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr
    losses = [float(word) for word in done.stdout.rpartition("losses ")[2].split()]
    assert losses[-1] < 0.5 * losses[0]
