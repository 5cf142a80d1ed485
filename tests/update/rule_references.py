"""The table of update rules under test, each with an optimizer that computes the same in one process.

A new rule gets all tests of ``test_rules.py``, ``test_rule_state.py`` and ``test_equivalence.py`` by an entry in
``CASES``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from transformers.optimization import Adafactor

import lomo_ds
from lomo_ds.config.lomo_config import OPTIMIZERS, OptimizerKind
from lomo_ds.numerics.int8 import eager
from lomo_ds.update.rules import RULES, Rule
from tests.engines import largest_difference, make_engine, weights_of
from tests.reference import DecoupledSGD, PlainTraining, trained_parameters
from tests.update.example_rules import (
    MOMENTUM,
    EightBitMomentum,
    Momentum,
    ProjectedSgd,
    SpectralDescent,
    projection_of,
    spectral_norm,
)

WEIGHT_DECAY = 0.1


class EightBitMomentumSGD(DecoupledSGD):
    """SGD with momentum, which is put into eight bits after every step, in the blocks of each rank's part.

    Attributes:
        largest_code: the largest difference between two codes so far.
    """

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr, weight_decay)
        self.parts = dist.get_world_size() if dist.is_initialized() else 1
        self.momentum: dict[Parameter, list[tuple[Tensor, Tensor]]] = {}
        self.largest_code = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            chunks = parameter.grad.flatten().chunk(self.parts)
            momentum = self.momentum.setdefault(parameter, [eager.encode(torch.zeros_like(part)) for part in chunks])
            for (codes, scales), part in zip(momentum, chunks, strict=True):
                eager.update_(codes, scales, part, -1.0, MOMENTUM, None)
                self.largest_code = max(self.largest_code, float(scales.max()))
            decoded = [eager.decode(codes, scales, torch.float32) for codes, scales in momentum]
            parameter.grad = torch.cat(decoded).view_as(parameter)
        super().step()


class SpectralSGD(DecoupledSGD):
    """SGD whose gradients are divided by their spectral norm."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad /= spectral_norm(parameter.grad).clamp(min=1e-30)
        super().step()


class SubspaceSGD(DecoupledSGD):
    """SGD whose gradients are projected, then clipped, then projected back."""

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr, weight_decay)
        self.projected: dict[Parameter, Parameter] = {}

    def clipped(self, parameter: Parameter) -> Parameter:
        """Return a parameter whose gradient is the projected one."""
        projection = projection_of(parameter.shape)
        if projection is None or parameter.grad is None:
            return parameter
        carrier = self.projected[parameter] = Parameter(torch.zeros(*parameter.shape[:-1], projection.shape[1]))
        carrier.grad = parameter.grad @ projection
        return carrier

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            projection = projection_of(parameter.shape)
            if projection is None or parameter.grad is None:
                continue
            if parameter not in self.projected:  # nothing was clipped
                self.clipped(parameter)
            projected = self.projected.pop(parameter).grad
            assert projected is not None
            parameter.grad = projected @ projection.T
        super().step()


def adafactor(params: Iterable[Parameter], lr: float, weight_decay: float) -> Optimizer:
    """Return the optimizer that AdaLomo equals."""
    return Adafactor(
        list(params), lr, scale_parameter=True, relative_step=False, warmup_init=False, weight_decay=weight_decay
    )


@dataclass(frozen=True)
class RuleCase:
    """An update rule under test.

    Attributes:
        reference: builds what computes the same, from parameters, learning rate and decoupled weight decay.
        lr: learning rate.
        rule: builds the rule, if only tests have it.
    """

    reference: Callable[[list[Parameter], float, float], Optimizer]
    lr: float
    rule: Callable[[], Rule] | None = None


CASES: dict[str, RuleCase] = {  # by the name of the rule in ``RULES``
    "lomo": RuleCase(DecoupledSGD, lr=0.3),
    "adalomo": RuleCase(adafactor, lr=0.02),
    "momentum": RuleCase(partial(DecoupledSGD, momentum=MOMENTUM), lr=0.1, rule=Momentum),
    "momentum8": RuleCase(EightBitMomentumSGD, lr=0.1, rule=EightBitMomentum),
    "projected": RuleCase(SubspaceSGD, lr=0.3, rule=ProjectedSgd),
    "spectral": RuleCase(SpectralSGD, lr=0.02, rule=SpectralDescent),
}
MIXED = "adalomo+lomo"  # embeddings and head by one rule, everything else by another
TRAININGS = [*CASES, MIXED]
EIGHT_BIT_STATE = {"momentum8"}  # whose blocks belong to a number of ranks


@contextlib.contextmanager
def example_rules() -> Iterator[None]:
    """Register the rules that only tests have as optimizers; it can decorate a function that ranks run."""
    rules = {name: case.rule for name, case in CASES.items() if case.rule is not None}
    kinds = {name: OptimizerKind(name, learning_rate=0.1) for name in rules}
    with mock.patch.dict(RULES, rules), mock.patch.dict(OPTIMIZERS, kinds):
        yield


def is_example(name: str) -> bool:
    """Return whether only tests have the rules of ``name``, or the mixture of them."""
    return name == MIXED or CASES[name].rule is not None


def difference(name: str, engine: lomo_ds.LomoEngine, training: PlainTraining) -> float:
    """Return the largest difference of a weight from the reference's.

    With state in eight bits, sums over ranks that differ in their last bits may put a number between two codes into
    the other one. All weights that this has not happened to are compared, at least 98 of 100.
    """
    weights, expected = weights_of(engine), dict(training.model.named_parameters())
    if name not in EIGHT_BIT_STATE:
        return largest_difference(weights, training.model)
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[key] - expected[key].detach()).abs().flatten() for key in weights]).sort().values
    (optimizer,) = training.optimizers
    assert isinstance(optimizer, EightBitMomentumSGD)
    assert float(differences[-1]) <= optimizer.largest_code * optimizer.param_groups[0]["lr"] / (1 - MOMENTUM)
    return float(differences[int(0.98 * len(differences))])


def rule_of(name: str) -> Rule:
    """Build a rule of ``CASES``."""
    return (CASES[name].rule or RULES[name])()


def rule_engine(
    name: str, model: Module, schedule: str, threshold: int = 0, accumulation: int = 1, **options: Any
) -> lomo_ds.LomoEngine:
    """Build an engine that trains with the rule or the rules of ``name``, see ``make_engine`` for the arguments."""
    rule = name.rpartition("+")[2]
    groups = [
        {"params": list(parameters.values()), "type": of_group, "lr": CASES[of_group].lr}
        for of_group, parameters in _parameters_of(name, model).items()
    ]
    arguments = {
        "lr": CASES[rule].lr,
        "params": {"weight_decay": WEIGHT_DECAY} | options.pop("params", {}),
        "optimizer_type": rule,
        "model_parameters": groups if "+" in name else None,
    }
    return make_engine(model, schedule, threshold, accumulation, **arguments, **options)


def plain_training(name: str, model: Module, **limits: float | None) -> PlainTraining:
    """Return what computes the same in one process, see ``PlainTraining`` for the limits."""
    optimizers = [
        CASES[rule].reference(list(parameters.values()), CASES[rule].lr, WEIGHT_DECAY)
        for rule, parameters in _parameters_of(name, model).items()
    ]
    return PlainTraining(model, optimizers, **limits)


def _parameters_of(name: str, model: Module) -> dict[str, dict[str, Parameter]]:
    """Return the trained parameters of each rule: embeddings and head of the first, everything else of the last."""
    first, _, last = name.rpartition("+")
    parameters: dict[str, dict[str, Parameter]] = {first or last: {}, last: {}}
    for parameter_name, parameter in trained_parameters(model).items():
        of_first = "embed_tokens" in parameter_name or "lm_head" in parameter_name
        parameters[first if first and of_first else last][parameter_name] = parameter
    return parameters
