"""Baseline engines: their steps equal those of torch.optim, and they skip the steps that LomoEngine skips."""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Module

from lomo_ds.config.arguments import parse_arguments
from lomo_ds.config.ds_config import reconcile
from lomo_ds.engine.baseline import BaselineEngine, initialize_baseline
from lomo_ds.errors import ConfigError
from tests.engines import WHOLE_THRESHOLD, identical, largest_difference, my_part, weights_of
from tests.ranks import Ranks
from tests.reference import OddForCausalLM, part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
RATES = {"adamw": 3e-4, "sgd": 0.3}
CLIP = 0.1  # gradient norms are above 1, so every step is clipped


def make_baseline(
    model: Module, optim: str, accumulation: int = 1, zero: dict[str, Any] | None = None, **sections: Any
) -> BaselineEngine:
    """Build the engine of ``--optim``; ``zero`` and ``sections`` extend the ds_config."""
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0} | (zero or {}),
        "optimizer": {"type": "LOMO", "params": {"lr": "auto", "weight_decay": "auto"}},
    } | sections
    values = {
        "optim": optim, "learning_rate": RATES[optim], "weight_decay": 0.1, "max_grad_norm": CLIP,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation,
        "model_name_or_path": "m", "train_file": "t", "output_dir": "o",
    }  # fmt: skip
    arguments, names = parse_arguments([f"--{name}={value}" for name, value in values.items()])
    return initialize_baseline(model, reconcile(config, arguments, names, dist.get_world_size())[0])


def trainable_model(tied: bool = False) -> OddForCausalLM:
    """Return a model without the parameter whose exact gradient is 0: AdamW would amplify its rounding error."""
    model = tiny_model(tied)
    model.shift.requires_grad_(False)
    return model


class PlainOptimizer:
    """Reference: torch.optim in one process on the batches of all ranks."""

    def __init__(self, model: Module, optim: str) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optim]
        self.optimizer = optimizer_class(self.trained, lr=RATES[optim], weight_decay=0.1)

    def step(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Take one step; return the loss and the gradient norm before clipping."""
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        for parameter in self.trained:
            if parameter.grad is None:  # DeepSpeed also decays parameters that the loss does not depend on
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        return float(loss.detach()), float(norm)


def train_both(optim: str, accumulation: int, tied: bool, zero: dict[str, Any]) -> float:
    """Take three steps with an engine and with plain PyTorch; return the largest weight difference."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = trainable_model(tied)
    reference = PlainOptimizer(copy.deepcopy(model), optim)
    engine = make_baseline(model, optim, accumulation, zero)
    for step in range(3):
        batch = whole_batch(step, rows=world_size * accumulation)
        loss, norm = reference.step(batch)
        rank_batch = part(batch, rank, world_size)
        step_loss = engine.train_batch([part(rank_batch, index, accumulation) for index in range(accumulation)])
        assert (step_loss.shape, step_loss.dtype) == ((), torch.float32)
        assert float(step_loss) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
        assert norm > CLIP
    assert (engine.global_steps, engine.skipped_steps, engine.micro_steps) == (3, 0, 3 * accumulation)
    difference = largest_difference(weights_of(engine), reference.model)
    engine.destroy()
    return difference


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_equals_torch_optim(ranks: GroupOf, optim: str, accumulation: int, world_size: int) -> None:
    for tied, threshold in ((False, 0), (True, WHOLE_THRESHOLD)):
        zero = {"stage3_param_persistence_threshold": threshold}
        differences = ranks(world_size).run(train_both, optim, accumulation, tied, zero)
        print(f"{optim}, {world_size} ranks, accumulation {accumulation}: {max(differences):.1e}")
        assert max(differences) < 1e-6


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_equals_torch_optim_offloaded(ranks: GroupOf, optim: str, section: str) -> None:
    """Check that offloaded steps use torch.optim too, where DeepSpeed would compile its own Adam."""
    assert max(ranks(2).run(train_both, optim, 2, False, {section: {"device": "cpu"}})) < 1e-6


def small_steps_in_bf16() -> tuple[float, float]:
    """Return the change of a weight that starts at 1 after one step and after 40, read like an export."""
    engine = make_baseline(tiny_model(), "adamw", bf16={"enabled": True})
    distances = []
    for steps in (1, 39):
        for _ in range(steps):
            engine.train_batch(my_part(whole_batch(0, rows=2)))
        gain = weights_of(engine)["gain"]
        assert gain.dtype == torch.bfloat16
        distances.append(abs(float(gain) - 1.0))
    return distances[0], distances[1]


def test_steps_too_small_for_bf16_add_up_in_fp32(ranks: GroupOf) -> None:
    """Check that bf16 weights accumulate steps of 3e-4, less than half the bf16 spacing at 1 (0.004 and 0.008)."""
    for near, far in ranks(2).run(small_steps_in_bf16):
        assert near == 0.0
        assert far >= 2.0**-8, "40 of them are not"


# skipped steps


def skip(reason: str) -> tuple[float, list[str]]:
    """Skip a step between two normal ones."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lomo_ds").addHandler(handler)
    model = trainable_model()
    reference = PlainOptimizer(copy.deepcopy(model), "adamw")
    engine = make_baseline(model, "adamw", accumulation=2)
    batches = [whole_batch(step, rows=4) for step in range(3)]
    if reason == "the step has no labelled items":
        batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)

    def poison(value: Any) -> Any:
        return value * math.nan if dist.get_rank() == 1 and engine.global_steps == 1 else value

    def poison_loss(module: Any, inputs: Any, output: Any) -> Any:
        output.loss = poison(output.loss)
        return output

    if reason == "a loss was not finite":
        engine.module.register_forward_hook(poison_loss)
    if reason == "a gradient was not finite":
        model.gain.register_hook(poison)
    for step, batch in enumerate(batches):
        rank_batch, before = my_part(batch), weights_of(engine)
        loss = engine.train_batch([part(rank_batch, 0, 2), part(rank_batch, 1, 2)])
        assert identical(before, weights_of(engine)) == (step == 1)
        assert engine.was_step_applied() == (step != 1)
        assert math.isfinite(loss) == (step != 1 or reason == "a gradient was not finite")
        if step != 1:
            assert float(loss) == pytest.approx(reference.step(batch)[0], abs=1e-5)
    assert (engine.global_steps, engine.skipped_steps, engine.micro_steps) == (3, 1, 6)
    logging.getLogger("lomo_ds").removeHandler(handler)
    return largest_difference(weights_of(engine), reference.model), [record for record in records if reason in record]


@pytest.mark.parametrize(
    "reason", ["the step has no labelled items", "a loss was not finite", "a gradient was not finite"]
)
def test_a_skipped_step_changes_nothing(ranks: GroupOf, reason: str) -> None:
    outcomes = ranks(2).run(skip, reason)
    assert max(difference for difference, _ in outcomes) < 1e-6
    assert [len(message) for _, message in outcomes] == [1, 0], "rank 0 tells it, once"
    assert outcomes[0][1][0].startswith("step 2 skipped, no weight was changed: ")


def scales_in_fp16() -> list[float]:
    """Return the loss scales of some steps: 2 ** 24 overflows fp16, and the scale grows after two good steps."""
    # DeepSpeed calls fp16 unsupported on the CPU; it is correct there, only slow
    get_accelerator().is_fp16_supported = lambda: True
    section = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}
    engine = make_baseline(tiny_model(), "adamw", fp16=section)
    scales = []
    for step in range(16):
        before, skipped = weights_of(engine), engine.skipped_steps
        assert math.isfinite(engine.train_batch(my_part(whole_batch(step, rows=4))))
        assert identical(before, weights_of(engine)) == (engine.skipped_steps > skipped)
        scales.append(engine.cur_scale)
    return scales


def test_the_loss_scale_of_fp16_falls_and_rises(ranks: GroupOf) -> None:
    first, second = ranks(2).run(scales_in_fp16)
    assert first == second
    falls = next(step for step in range(1, 16) if first[step] >= first[step - 1])
    assert falls > 1, "several halvings first"
    assert any(first[step] == 2 * first[step - 1] for step in range(1, 16))


def the_smallest_scale() -> float:
    get_accelerator().is_fp16_supported = lambda: True
    section = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1}
    engine = make_baseline(tiny_model(), "sgd", fp16=section)
    engine.module.gain.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(4):
        engine.train_batch(my_part(whole_batch(0, rows=2)))
    assert engine.skipped_steps == 4
    return engine.cur_scale


def test_a_run_continues_at_the_smallest_scale(ranks: GroupOf) -> None:
    assert ranks(2).run(the_smallest_scale) == [1.0, 1.0]


def after_an_exception() -> float:
    model = trainable_model()
    reference = PlainOptimizer(copy.deepcopy(model), "adamw")
    engine = make_baseline(model, "adamw", accumulation=2)
    batch = whole_batch(0, rows=4)
    micro_batches = [part(my_part(batch), index, 2) for index in range(2)]
    with pytest.raises(ValueError, match="input_ids"):
        engine.train_batch([micro_batches[0], {**micro_batches[1], "input_ids": None}])
    reference.step(batch)
    engine.train_batch(micro_batches)
    return largest_difference(weights_of(engine), reference.model)


def test_a_failed_step_leaves_nothing_behind(ranks: GroupOf) -> None:
    assert max(ranks(2).run(after_an_exception)) < 1e-6


# learning rates, refusals


def rates_of_steps(lr_scheduler: Any, sections: dict[str, Any]) -> list[float]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.4}},
    } | sections
    engine = initialize_baseline(tiny_model(), config, lr_scheduler)
    rates = []
    for step in range(3):
        rates += engine.get_lr()
        engine.train_batch(my_part(whole_batch(step, rows=2)))
    return rates


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


@pytest.mark.parametrize(
    ("scheduler", "section"),
    [
        (halved, {}),
        (None, {"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}}),
    ],
    ids=["callable", "of the ds_config"],
)
def test_learning_rate_schedules(ranks: GroupOf, scheduler: Any, section: dict[str, Any]) -> None:
    assert ranks(2).run(rates_of_steps, scheduler, section) == [[0.4, 0.2, 0.1]] * 2


def refusal(sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        make_baseline(tiny_model(), "adamw", **sections)
    return str(refused.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"zero": {"stage": 2}}, "ZeRO stage 3, got zero_optimization.stage 2; set it to 3"),
        ({"zero": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device nvme is not supported"),
        (
            {"zero": {"offload_param": {"device": "nvme"}}},
            "offload_param.device nvme is not supported for",
        ),
        ({"prescale_gradients": True}, "DeepSpeed's ZeRO-3 rejects its config: pre-scale gradients is not yet"),
    ],
)
def test_unsupported_settings_are_refused(ranks: GroupOf, sections: dict[str, Any], expected: str) -> None:
    (message,) = ranks(1).run(refusal, sections)
    assert expected in message
    assert "\n" not in message


def empty() -> None:
    with pytest.raises(ConfigError, match="at least one micro-batch, got an empty list"):
        make_baseline(tiny_model(), "sgd").train_batch([])


def test_a_step_needs_a_micro_batch(ranks: GroupOf) -> None:
    ranks(1).run(empty)
