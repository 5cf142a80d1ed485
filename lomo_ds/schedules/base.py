"""What every schedule shares: the targets, the running norms and the call that updates one shard."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lomo_ds.clipping import Clipping
from lomo_ds.numerics import squared_norm
from lomo_ds.rules import Rule


@dataclass(frozen=True)
class Target:
    """One parameter as a schedule sees it."""

    shard: Tensor  # 1-D, this rank's part
    group: int  # index of its clipping group
    options: dict[str, Any]  # its param_group, read at every update: "lr", "weight_decay"


class Schedule(ABC):
    """Decides when a gradient shard meets the rule.

    A step is ``start``, then for each gradient of each backward ``take``, after each backward ``flush``, then once
    ``measure`` and, if all ranks found the step sound, ``apply``.

    Every gradient a schedule is given is ``scale`` times the true one: the loss scale, times the number of ranks
    whose gradients were summed. Norms are kept so too.

    Args:
        targets: all parameters that train, in the model's order.
        device: where gradients are computed.
    """

    passes = 1  # forward and backward passes in a step
    updates_in_backward = False  # whether weights change before all ranks have agreed on the step
    keeps_gradients = False  # whether gradients of several backward passes add up

    def __init__(self, targets: list[Target], rule: Rule, clipping: Clipping, device: torch.device) -> None:
        self.targets = targets
        self.rule = rule
        self.clipping = clipping
        self.squared_norms = torch.zeros(
            1 + max((target.group for target in targets), default=0), dtype=torch.float64, device=device
        )
        self.scale = 1.0

    def start(self, scale: float) -> None:
        """Begin a step, forgetting whatever is left of the last."""
        self.scale = scale
        self.squared_norms.zero_()

    @abstractmethod
    def take(self, index: int, gradient: Tensor) -> None:
        """Use the gradient shard (1-D, its own memory) of target ``index``."""

    def flush(self) -> None:
        """Backward has ended: no more gradients of this micro-batch."""

    def measure(self) -> Tensor:
        """Squared norm of each clipping group over this rank's shards, float64, scaled by ``scale`` squared."""
        return self.squared_norms

    def apply(self, coefficients: list[float]) -> None:
        """All ranks agree that the step is sound; ``coefficients`` are the clip factors of the groups."""

    def add_to_norm(self, index: int, gradient: Tensor) -> None:
        """Count a gradient shard into the norm of its group."""
        self.squared_norms[self.targets[index].group] += squared_norm(gradient).to(self.squared_norms.device)

    def update(self, index: int, gradient: Tensor, coefficient: float | Tensor) -> None:
        """Let the rule write target ``index`` from its gradient shard, which is clobbered."""
        target = self.targets[index]
        self.clipping.clamp_(gradient, self.scale)
        self.rule.update(
            [target.shard], [gradient], coefficient / self.scale, target.options["lr"], target.options["weight_decay"]
        )
