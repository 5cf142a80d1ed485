"""Objects passed to initialize: each takes effect, or is refused with a clear error message."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Linear, Module
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import lomo_ds
from lomo_ds.engine.client_arguments import validate_model_parameters, validate_training_data
from lomo_ds.errors import ConfigError
from tests.engines import make_engine
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]

MODEL = Linear(3, 2)
WEIGHT, BIAS = MODEL.weight, MODEL.bias
OTHER = Linear(3, 2)


class Regression(Module):
    """A module that returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


# learning-rate schedulers


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    scheduler: Any = StepLR(SGD(MODEL.parameters(), 0.1), 1, gamma=0.1)
    with pytest.raises(ConfigError, match=r"got a StepLR, which acts on another optimizer; give a function"):
        lomo_ds.initialize(model=MODEL, config={}, lr_scheduler=scheduler)


def refused_schedulers() -> list[str]:
    other = SGD(OTHER.parameters(), 0.1)
    reasons = []
    for build in (lambda _: StepLR(other, 1), lambda _: None, lambda _: 0.5):
        with pytest.raises(ConfigError) as refusal:
            make_engine(Regression(), lr_scheduler=build)
        reasons.append(str(refusal.value))
    return reasons


def test_a_function_must_return_a_scheduler_of_its_optimizer(ranks: GroupOf) -> None:
    other_optimizer, none, number = ranks(1).run(refused_schedulers)[0]
    assert "returned a StepLR that acts on another SGD" in other_optimizer
    assert "must return a scheduler with step(), got None" in none
    assert "must return a scheduler with step(), got a float" in number


def rates_of_steps(build: Callable[[Any], Any]) -> list[float]:
    engine = make_engine(Regression(), lr_scheduler=build)
    rates = []
    for _ in range(3):
        rates += engine.get_lr()
        engine.train_batch({"x": torch.ones(1, 3)})
    return rates


def step_lr(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 1, gamma=0.5)


class CustomScheduler:
    """A scheduler that is not a subclass of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self.groups = optimizer.param_groups

    def step(self) -> None:
        for group in self.groups:
            group["lr"] /= 2


@pytest.mark.parametrize("build", [step_lr, CustomScheduler])
def test_a_function_of_the_optimizer_is_used(ranks: GroupOf, build: Callable[[Any], Any]) -> None:
    assert ranks(1).run(rates_of_steps, build) == [[0.3, 0.15, 0.075]]


def plateau() -> tuple[str, float]:
    engine = make_engine(Regression(), lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, patience=0))
    with pytest.raises(ConfigError) as refusal:
        engine.train_batch({"x": torch.ones(1, 3)})
    for metric in (1.0, 2.0):
        engine.backward(engine(x=torch.ones(1, 3)))
        engine.step({"metrics": metric})
    return str(refusal.value), engine.get_lr()[0]


def test_a_scheduler_that_needs_a_metric_does_not_get_the_batch_size(ranks: GroupOf) -> None:
    reason, rate = ranks(1).run(plateau)[0]
    assert "ReduceLROnPlateau needs a metric" in reason
    assert rate == pytest.approx(0.03)


# parameters


@pytest.mark.parametrize(
    "model_parameters",
    [
        [WEIGHT],
        (WEIGHT, BIAS),
        [{"params": [WEIGHT]}, {"params": [BIAS], "lr": 0.1, "weight_decay": torch.tensor(0.0)}],
        [{"params": WEIGHT, "name": "matrix"}],
        [{"params": [WEIGHT], "type": "AdaLomo"}, {"params": [BIAS], "type": "LOMO", "lr": 0.1}],
        list(MODEL.named_parameters()),
    ],
)
def test_parameters_of_the_model_are_accepted(model_parameters: Any) -> None:
    assert validate_model_parameters(MODEL, model_parameters) == list(model_parameters)


@pytest.mark.parametrize("in_group", [False, True])
def test_a_generator_is_read_once(in_group: bool) -> None:
    if in_group:
        groups = validate_model_parameters(MODEL, [{"params": (p for p in MODEL.parameters())}])
        assert groups is not None
        assert groups[0]["params"] == [WEIGHT, BIAS]
    else:
        assert validate_model_parameters(MODEL, MODEL.parameters()) == [WEIGHT, BIAS]


@pytest.mark.parametrize(
    ("model_parameters", "reason"),
    [
        ([], "holds no parameter"),
        ([{"params": []}], "holds no parameter"),
        (iter(()), "holds no parameter"),
        (WEIGHT, "got a Parameter"),
        ({"params": [WEIGHT]}, "got a dict"),
        (MODEL, "got a Linear"),
        (["weight"], "got 'weight'"),
        ([OTHER.weight], r"shape \[2, 3\] that is not a parameter of the model"),
        ([WEIGHT, WEIGHT.detach()], "not a parameter of the model"),
        ([WEIGHT, WEIGHT], r"shape \[2, 3\] twice"),
        ([{"params": [WEIGHT]}, {"params": [WEIGHT, BIAS]}], "twice"),
        ([{"params": [WEIGHT]}, BIAS], "must be a dict with"),
        ([{"parameters": [WEIGHT]}], "must be a dict with"),
        ([{"params": [WEIGHT], "learning_rate": 1.0}], "got 'learning_rate'"),
        ([{"params": [WEIGHT], "momentum": 0.9}], "got 'momentum'"),
        ([{"params": [WEIGHT], "lr": "0.1"}], "lr of a group .* got '0.1'"),
        ([{"params": [WEIGHT], "lr": -1.0}], "got -1.0"),
        ([{"params": [WEIGHT], "weight_decay": float("nan")}], "got nan"),
    ],
)
def test_invalid_model_parameters_are_refused(model_parameters: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate_model_parameters(MODEL, model_parameters)


# data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "must not be empty, got an empty list"),
        ("texts.jsonl", "got 'texts.jsonl'"),
        (iter([1]), "got a list_iterator"),
        (torch.utils.data.DataLoader([1]), r"give its \.dataset"),  # type: ignore[arg-type]
    ],
)
def test_invalid_training_data_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate_training_data(data, None)


def test_collate_fn_is_a_function() -> None:
    with pytest.raises(ConfigError, match="collate_fn must be a function, got 'pad'"):
        validate_training_data([1], "pad")  # type: ignore[arg-type]
