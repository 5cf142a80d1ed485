"""What every schedule shares: the targets, the gradients' norms and the call that updates shards."""

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lomo_ds.numerics.flat import norms
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.rules import Rule
from lomo_ds.zero3.stores import Store


@dataclass(frozen=True)
class Target:
    """One parameter as a schedule sees it."""

    numel: int  # of this rank's shard
    group: int  # index of its clipping group
    options: dict[str, Any]  # its param_group, read at every update: "lr", "weight_decay"


class Schedule(ABC):
    """Decides when gradient shards meet the rule.

    A step is ``start``, then for the gradients of each backward ``take``, some at a time, after each backward
    ``flush``, then once ``measure`` and, if all ranks found the step sound, ``apply``.

    Every gradient a schedule is given is ``scale`` times the true one: the loss scale, times the number of ranks
    whose gradients were summed. Norms are kept so too. Nothing here waits for the device.

    Args:
        targets: all parameters that train, in the model's order.
        store: keeps their shards.
        device: where gradients are computed.
    """

    passes = 1  # forward and backward passes in a step
    updates_in_backward = False  # whether weights change before all ranks have agreed on the step
    keeps_gradients = False  # whether gradients of several backward passes add up

    def __init__(
        self, targets: list[Target], store: Store, rule: Rule, clipping: Clipping, device: torch.device
    ) -> None:
        self.targets = targets
        self.store = store
        self.rule = rule
        self.clipping = clipping
        self.device = device
        groups = torch.tensor([target.group for target in targets])
        self.members = (groups == torch.arange(int(groups.max()) + 1)[:, None]).to(device)  # groups x targets
        self.kinds = self._kinds()
        self.no_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.start(scale=1.0)

    def start(self, scale: float) -> None:
        """Begin a step, forgetting whatever is left of the last."""
        self.scale = scale
        self.norms = [self.no_norm] * len(self.targets)  # of each target's gradient shard, 0-dim float32
        self.store.flush()

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        """A gathered copy of a target is at hand, as its gradient is; a store may spare a copy by it."""

    @abstractmethod
    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        """Use the gradient shards (1-D, to be kept or clobbered) of some targets."""

    def flush(self) -> None:
        """Backward has ended: no more gradients of this micro-batch."""
        self.store.flush()

    def measure(self) -> Tensor:
        """Squared norm of each clipping group over this rank's shards, float64, scaled by ``scale`` squared."""
        squares = torch.stack(self.norms).double().square()
        return torch.where(self.members, squares, 0.0).sum(dim=1)  # index_add_ would add up in any order on CUDA

    def apply(self, coefficients: list[float]) -> None:
        """All ranks agree that the step is sound; ``coefficients`` are the clip factors of the groups."""

    def note_norms(self, indices: list[int], gradients: list[Tensor]) -> None:
        """Remember the norms of these targets' gradient shards, in the place of earlier ones."""
        for index, norm in zip(indices, norms(gradients), strict=True):
            self.norms[index] = norm

    def update(
        self,
        indices: list[int],
        gradients: list[Tensor],
        coefficients: list[float] | float | Tensor,
        squares: SquareSums | None = None,
    ) -> None:
        """Let the rule write targets from their gradient shards, which are clobbered.

        Args:
            coefficients: the clip factors of all groups, or the one of these targets.
            squares: see ``Rule.update``.
        """
        alike: dict[int, list[int]] = defaultdict(list)
        for position, index in enumerate(indices):
            alike[self.kinds[index]].append(position)
        for some in alike.values():
            chosen = [gradients[position] for position in some]
            target = self.targets[indices[some[0]]]
            coefficient = coefficients[target.group] if isinstance(coefficients, list) else coefficients
            lr, weight_decay = target.options["lr"], target.options["weight_decay"]
            limit = self.clipping.limit(self.scale)
            for shards, theirs in self.store.lend([indices[position] for position in some], chosen):
                self.rule.update(shards, theirs, coefficient / self.scale, lr, weight_decay, limit, squares)

    def _kinds(self) -> list[int]:
        """A number for each target; those with the same are updated alike: one param_group, one clip factor."""
        numbers: dict[tuple[int, int], int] = {}
        by_group = self.clipping.group_norm is not None
        keys = [(id(target.options), target.group if by_group else 0) for target in self.targets]
        return [numbers.setdefault(key, len(numbers)) for key in keys]
