"""Targets of 1-D parameters on one rank, named by their number."""

from collections.abc import Sequence
from typing import Any

import torch

from lomo_ds.update.target import Target


def flat_targets(
    numels: Sequence[int], groups: Sequence[int] | None = None, options: dict[str, Any] | None = None
) -> list[Target]:
    """Return a target for each number of elements; by default in one clipping group, with learning rate 0.5.

    Args:
        options: the param group of all targets.
    """
    options = {"lr": 0.5, "weight_decay": 0.0} if options is None else options
    return [
        Target(str(number), torch.Size([numel]), 0, numel, group, options)
        for number, (numel, group) in enumerate(zip(numels, groups or [0] * len(numels), strict=True))
    ]
