"""Learning-rate schedulers without warm-up: compared with their closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

import lomo_ds
from lomo_ds.config.arguments import parse_arguments
from lomo_ds.config.ds_config import fill_scheduler, reconcile
from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.engine.lr_schedulers import build_scheduler
from tests.reference import even_batch, tiny_model

PEAK, TOTAL, FLOOR = 0.5, 8, 0.1
REQUIRED = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]
CLOSED_FORMS: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("WarmupLR", {"warmup_max_lr": PEAK}, lambda step: PEAK),
    ("WarmupLR", {"warmup_max_lr": PEAK, "warmup_type": "linear", "warmup_min_lr": 0.1}, lambda step: PEAK),
    ("WarmupLR", {}, lambda step: PEAK),
    ("WarmupDecayLR", {"warmup_max_lr": PEAK, "total_num_steps": TOTAL}, lambda step: PEAK * max(0, 1 - step / TOTAL)),
    ("WarmupDecayLR", {"total_num_steps": TOTAL}, lambda step: PEAK * max(0, 1 - step / TOTAL)),
    (
        "WarmupCosineLR",
        {"total_num_steps": TOTAL, "cos_min_ratio": FLOOR},
        lambda step: PEAK * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1, step / TOTAL))) / 2),
    ),
]


@pytest.mark.parametrize(("name", "params", "rate"), CLOSED_FORMS)
def test_without_warmup_the_rate_starts_at_the_peak_and_decays(
    name: str, params: dict[str, Any], rate: Callable[[int], float]
) -> None:
    config = {"scheduler": {"type": name, "params": {**params, "warmup_num_steps": 0}}}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = build_scheduler(name, complete_ds_config(config, 1)["scheduler"]["params"], optimizer)
    for step in range(TOTAL + 3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step), abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("name", "params", "rate"), CLOSED_FORMS)
def test_auto_without_a_warmup_ratio_has_no_warmup(
    name: str, params: dict[str, Any], rate: Callable[[int], float], ranks: Any
) -> None:
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 3},
        "scheduler": {"type": name, "params": {**params, "warmup_num_steps": "auto"}},
    }
    if "warmup_max_lr" in params:
        config["scheduler"]["params"]["warmup_max_lr"] = "auto"
    arguments, given_names = parse_arguments([*REQUIRED, "--learning_rate", str(PEAK)])
    filled, arguments = reconcile(config, arguments, given_names, world_size=1)
    [rates] = ranks(1).run(rates_of_steps, fill_scheduler(filled, arguments, TOTAL), 3)
    assert rates == pytest.approx([rate(step) for step in range(3)])


def rates_of_steps(config: dict[str, Any], steps: int) -> list[float]:
    """Return the learning rates of an engine's steps."""
    engine = lomo_ds.initialize(model=tiny_model(), config=config)[0]
    rates = []
    for step in range(steps):
        rates += engine.get_lr()
        engine.train_batch(even_batch(step, 2))
    engine.destroy()
    return rates


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 2.0}]
    optimizer = torch.optim.SGD(groups)
    build_scheduler("WarmupLR", {"warmup_num_steps": 0}, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]
    build_scheduler("WarmupLR", {"warmup_num_steps": 0, "warmup_max_lr": [3.0, 4.0]}, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [3.0, 4.0]


def test_a_warmup_uses_deepspeeds_class() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    assert type(build_scheduler("WarmupLR", {"warmup_num_steps": 3}, optimizer)) is lr_schedules.WarmupLR


def test_a_decay_without_warmup_max_lr_rises_to_the_optimizers_rate() -> None:
    params = {"total_num_steps": TOTAL, "warmup_num_steps": 2, "warmup_type": "linear"}
    config = complete_ds_config({"scheduler": {"type": "WarmupDecayLR", "params": params}}, world_size=1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = build_scheduler("WarmupDecayLR", config["scheduler"]["params"], optimizer)
    rates = []
    for _ in range(TOTAL):
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == PEAK, "DeepSpeed's own default is 0.001"
