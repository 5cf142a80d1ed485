"""Learning-rate schedulers by name; adds support for 0 warm-up steps, which DeepSpeed's own classes reject."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def build_scheduler(name: str, params: dict[str, Any], optimizer: Optimizer) -> Any:
    """Build the scheduler class of that name from DeepSpeed, or else from torch."""
    scheduler_class = getattr(lr_schedules if hasattr(lr_schedules, name) else torch.optim.lr_scheduler, name)
    if name not in DECAYS or not params or params.get("warmup_num_steps") != 0:
        return scheduler_class(optimizer, **params)
    bound = inspect.signature(scheduler_class).bind(optimizer, **params)
    bound.apply_defaults()
    return _without_warmup(name, bound.arguments, optimizer)


def _without_warmup(name: str, params: dict[str, Any], optimizer: Optimizer) -> LambdaLR:
    """Build a scheduler that starts at the peak learning rate, and then decays as after a warm-up."""
    peaks = params.get("warmup_max_lr")
    if peaks is not None:
        groups = optimizer.param_groups
        peaks = peaks if isinstance(peaks, list | tuple) else [peaks] * len(groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = group["initial_lr"] = peak
    return LambdaLR(optimizer, DECAYS[name](params))


def _constant(params: dict[str, Any]) -> Callable[[int], float]:
    return lambda step: 1.0


def _linear_decay(params: dict[str, Any]) -> Callable[[int], float]:
    total = params["total_num_steps"]
    return lambda step: max(0.0, (total - step) / max(1, total))


def _cosine_decay(params: dict[str, Any]) -> Callable[[int], float]:
    total, floor = params["total_num_steps"], params["cos_min_ratio"]

    def factor(step: int) -> float:
        progress = min(1.0, step / max(1, total))
        return max(0.0, floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

    return factor


DECAYS: dict[str, Callable[[dict[str, Any]], Callable[[int], float]]] = {
    "WarmupLR": _constant,
    "WarmupDecayLR": _linear_decay,
    "WarmupCosineLR": _cosine_decay,
}
