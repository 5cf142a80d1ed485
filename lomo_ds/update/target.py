"""Targets: the trained parameters, as they travel from the gradient hooks to the update rule."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Target:
    """A trained parameter: this rank's slice of it, and the settings that it is updated with.

    Attributes:
        name: of the parameter in the model; stores know its shard by it.
        shape: of the full parameter.
        start, stop: this rank's slice of the flattened (row-major) parameter.
        group: number of its clipping group.
        options: its param group, whose "lr" and "weight_decay" are read at every update.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    group: int
    options: dict[str, Any]

    @property
    def numel(self) -> int:
        """Elements of this rank's slice."""
        return self.stop - self.start

    @property
    def full_numel(self) -> int:
        """Elements of the full parameter."""
        return self.shape.numel()
