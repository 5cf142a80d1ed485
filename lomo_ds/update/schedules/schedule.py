"""Base class of the update schedules: targets, gradient norms, and the call that updates shards."""

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
    """A trained parameter, as schedules need to know it."""

    numel: int  # elements of this rank's shard
    group: int  # index of its clipping group
    options: dict[str, Any]  # its param group, whose "lr" and "weight_decay" are read at every update


class Schedule(ABC):
    """Decides when gradient shards are passed to the update rule.

    The calls of a step are: ``start``; during each backward pass several calls of ``receive``, and ``flush`` at its
    end; then ``squared_norms``; and ``apply``, unless the step must be skipped.

    Every gradient passed to a schedule is ``scale`` times the true gradient: the loss scale times the number of ranks
    whose gradients were summed. Recorded norms have the same factor. Methods do not wait for the device.

    Args:
        targets: all trained parameters, in the model's order.
        store: holds their shards.
        rule: computes the updates.
        clipping: the clipping settings.
        device: the device gradients are computed on.
    """

    passes = 1  # forward and backward passes per step
    updates_in_backward = False  # whether weights change before overflow and global norm are known
    keeps_gradients = False  # whether gradients can accumulate over several backward passes

    def __init__(
        self, targets: list[Target], store: Store, rule: Rule, clipping: Clipping, device: torch.device
    ) -> None:
        self.targets = targets
        self.store = store
        self.rule = rule
        self.clipping = clipping
        self.device = device
        groups = torch.tensor([target.group for target in targets])
        self.group_masks = (groups == torch.arange(int(groups.max()) + 1)[:, None]).to(device)  # groups x targets
        self.update_keys = self._number_update_keys()
        self.zero_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.start(scale=1.0)

    def start(self, scale: float) -> None:
        """Start a step, discarding everything that remains from the previous one."""
        self.scale = scale
        self.norms = [self.zero_norm] * len(self.targets)  # norm of each target's gradient shard, 0-dim float32
        self.store.flush()

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        """Offer a target's gathered weight, just before its gradient arrives; the store may use it to save a copy."""

    @abstractmethod
    def receive(self, indices: list[int], gradients: list[Tensor]) -> None:
        """Process the gradient shards (1-D) of some targets; the schedule may keep or overwrite them."""

    def flush(self) -> None:
        """End a backward pass; all gradients of the micro-batch have arrived."""
        self.store.flush()

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each clipping group over this rank's shards, float64, times ``scale`` squared."""
        squares = torch.stack(self.norms).double().square()
        return torch.where(self.group_masks, squares, 0.0).sum(dim=1)  # index_add_ is not deterministic on CUDA

    def apply(self, coefficients: list[float]) -> None:
        """Perform or enable the updates of a step that is not skipped, given the clip coefficient of each group."""

    def record_norms(self, indices: list[int], gradients: list[Tensor]) -> None:
        """Record the norms of these targets' gradient shards, replacing earlier ones."""
        for index, norm in zip(indices, norms(gradients), strict=True):
            self.norms[index] = norm

    def update(
        self,
        indices: list[int],
        gradients: list[Tensor],
        coefficients: list[float] | float | Tensor,
        squares: SquareSums | None = None,
    ) -> None:
        """Update targets with the rule; their gradient shards are overwritten.

        Args:
            coefficients: the clip coefficients of all groups, or one coefficient for all these targets.
            squares: see ``Rule.update``.
        """
        positions_of_key: dict[int, list[int]] = defaultdict(list)
        for position, index in enumerate(indices):
            positions_of_key[self.update_keys[index]].append(position)
        for positions in positions_of_key.values():
            target = self.targets[indices[positions[0]]]
            coefficient = coefficients[target.group] if isinstance(coefficients, list) else coefficients
            lr, weight_decay = target.options["lr"], target.options["weight_decay"]
            limit = self.clipping.limit(self.scale)
            key_indices = [indices[position] for position in positions]
            key_gradients = [gradients[position] for position in positions]
            for shards, shard_gradients in self.store.open_for_update(key_indices, key_gradients):
                self.rule.update(shards, shard_gradients, coefficient / self.scale, lr, weight_decay, limit, squares)

    def _number_update_keys(self) -> list[int]:
        """Number the targets so that those updated together, with one param group and coefficient, share a number."""
        numbers: dict[tuple[int, int], int] = {}
        by_group = self.clipping.group_norm is not None
        keys = [(id(target.options), target.group if by_group else 0) for target in self.targets]
        return [numbers.setdefault(key, len(numbers)) for key in keys]
