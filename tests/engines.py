"""Build an engine for a test, and read its weights back."""

import math
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.nn import Module

import lomo_ds
from tests.reference import part

WHOLE_THRESHOLD = 100_000  # DeepSpeed's default: all of a tiny model is persistent


def make_engine(
    model: Module,
    schedule: str = "auto",
    threshold: int = WHOLE_THRESHOLD,
    accumulation: int = 1,
    global_norm: float | None = None,
    lr: float = 0.3,
    params: dict[str, Any] | None = None,
    lr_scheduler: Any = None,
    optimizer_type: str = "LOMO",
    model_parameters: list[Any] | None = None,
    **sections: Any,
) -> lomo_ds.LomoEngine:
    """Build an engine for ``model``; ``sections`` extend or replace sections of the ds_config."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": global_norm or 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "optimizer": {"type": optimizer_type, "params": {"lr": lr, "update_schedule": schedule, **(params or {})}},
    } | sections
    return lomo_ds.initialize(model=model, model_parameters=model_parameters, config=config, lr_scheduler=lr_scheduler)[
        0
    ]


def weights_of(engine: lomo_ds.LomoEngine) -> dict[str, Tensor]:
    """Return a copy of every full parameter."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def largest_difference(weights: dict[str, Tensor], reference: Module) -> float:
    expected = dict(reference.named_parameters())
    assert expected.keys() == weights.keys()
    differences = [float((weights[name].float() - expected[name].float()).detach().abs().max()) for name in weights]
    return math.inf if any(math.isnan(difference) for difference in differences) else max(differences)


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether all weights are equal bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def my_part(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of a batch of all ranks."""
    return part(batch, dist.get_rank(), dist.get_world_size())


def my_chunk(whole: Tensor) -> Tensor:
    """Return this rank's part as in torch.chunk, which gives fewer parts if there are too few elements."""
    chunks = whole.flatten().chunk(dist.get_world_size())
    return chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else whole.flatten()[:0]
