"""A schedule of forward passes alone, with gradients that are computed piece by piece instead of by autograd."""

import copy
from collections.abc import Callable

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor

from lomo_ds.update.schedules.schedule import Schedule, StepPasses
from lomo_ds.update.target import Target
from tests.engines import largest_difference, make_engine, my_part, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

LR = 0.01


def direction(start: int, stop: int) -> Tensor:
    """Return a direction that depends on the position of an element in its parameter alone."""
    return torch.arange(start, stop).float().sin()


class ForwardOnly(Schedule):
    """Moves every parameter along ``direction``, by the loss of the batch."""

    def run(self, passes: StepPasses) -> None:
        loss = passes.forward()
        assert loss is not None

        def piece_of(target: Target) -> Callable[[int, int], Tensor]:
            return lambda start, stop: direction(target.start + start, target.start + stop)

        self.updater.update(self.targets, [piece_of(t) for t in self.targets], [loss] * len(self.targets), None)
        self.updater.flush()

    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        raise AssertionError("backward has run")


def train_both(offload: str) -> float:
    model = tiny_model()
    reference = copy.deepcopy(model)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 25, "offload_param": {"device": offload}}
    engine = make_engine(model, lr=LR, zero_optimization=zero)
    schedule = engine.schedule
    engine.optimizer.schedule = ForwardOnly(schedule.updater, schedule.clipping)
    for step in range(3):
        batch = whole_batch(step, rows=2 * dist.get_world_size())
        with torch.no_grad():
            loss = reference(**batch).loss
            for parameter in reference.parameters():
                if parameter.requires_grad:
                    parameter -= LR * loss * direction(0, parameter.numel()).view_as(parameter)
        assert float(engine.train_batch(my_part(batch))) == pytest.approx(float(loss), abs=1e-5)
    difference = largest_difference(weights_of(engine), reference)
    engine.destroy()
    return difference


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_plain_pytorch(ranks: Callable[..., Ranks], world_size: int, offload: str) -> None:
    assert max(ranks(world_size).run(train_both, offload)) < 1e-6
