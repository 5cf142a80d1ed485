"""Requests of trainers that the engine cannot carry out: a ConfigError says what to do instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import lomo_ds
from lomo_ds.errors import ConfigError
from tests.ranks import Ranks
from tests.trainers import (
    ds_config,
    lomo_installed,
    shuffled_trainer,
)

GroupOf = Callable[..., Ranks]


def refusal_of_trainer(folder: str, output_dir: str, params: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Return the error of a trainer with these parameters of LOMO and these arguments."""
    config = ds_config(optimizer={"type": "LOMO", "params": {"lr": "auto", **params}})
    with lomo_installed():
        trainer = shuffled_trainer(folder, output_dir, 1, deepspeed=config, **arguments)
        with pytest.raises(ConfigError) as refusal:
            trainer.train()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("params", "arguments", "reason"),
    [
        (
            {"update_schedule": "two_pass"},
            {"gradient_accumulation_steps": 1},
            "update_schedule two_pass must run every batch forward and backward twice",
        ),
        (
            {"update_schedule": "immediate"},
            {"max_grad_norm": 0.0},
            "update_schedule immediate keeps no gradients, which several micro-batches need",
        ),
        (
            {"update_schedule": "immediate"},
            {"gradient_accumulation_steps": 1},
            "update_schedule immediate cannot honour gradient_clipping 1.0",
        ),
        ({"learning_rte": 0.1}, {}, "LOMO has no parameter 'learning_rte'"),
        ({}, {"optim": "lomo"}, "leave optim out of TrainingArguments"),
        (
            {},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "ReduceLROnPlateau needs a metric, which train_batch and transformers' Trainer do not provide",
        ),
        ({}, {"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "GreedyLR needs a metric"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    ranks: GroupOf, assets: Path, tmp_path: Path, params: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    assert reason in ranks(1).run(refusal_of_trainer, str(assets), str(tmp_path), params, arguments)[0]


def test_an_optimizer_of_the_program_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lomo_ds.install(), pytest.raises(ConfigError, match=r"takes no optimizer, got SGD; name the optimizer in the"):
        deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config())
