"""Base class of the update schedules: gradient norms, and the call that updates shards."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from lomo_ds.numerics.flat import norms
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.rules import Rule
from lomo_ds.update.target import Target
from lomo_ds.zero3.stores import Store


class StepPasses(Protocol):
    """Forward and backward passes over the batches of a step, as ``Schedule.run`` asks for them."""

    def backward(self, repeatable: bool = False) -> bool:
        """Run all micro-batches forward and backward; return False if the step must be skipped.

        Args:
            repeatable: whether ``repeat`` may follow.
        """
        ...

    def reduce_norms(self) -> list[float] | None:
        """Reduce norms, overflow and loss over the ranks; return the clip coefficients, or None to skip the step."""
        ...

    def repeat(self) -> None:
        """Run the passes again; they compute the same gradients."""
        ...


class Schedule(ABC):
    """Decides which passes a step has, and when gradient shards are passed to the update rule.

    The calls of a step are: ``start``; ``run``, or the caller's own passes; during each backward pass several calls of
    ``receive``, and ``flush`` at its end; then ``squared_norms``; and ``apply``, unless the step must be skipped.

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
        self.zero_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.start(scale=1.0)

    def start(self, scale: float) -> None:
        """Start a step, discarding everything that remains from the previous one."""
        self.scale = scale
        self.norms: dict[Target, Tensor] = {}  # of the gradient shards that arrived, 0-dim float32
        self.store.flush()

    def run(self, passes: StepPasses) -> None:
        """Run the passes of a step."""
        passes.backward()

    def offer_gathered_weight(self, target: Target, weight: Tensor) -> None:
        """Offer a target's gathered weight, just before its gradient arrives; the store may use it to save a copy."""

    @abstractmethod
    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        """Process the gradient shards (1-D) of some targets; the schedule may keep or overwrite them."""

    def flush(self) -> None:
        """End a backward pass; all gradients of the micro-batch have arrived."""
        self.store.flush()

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each clipping group over this rank's shards, float64, times ``scale`` squared."""
        squares = torch.stack([self.norms.get(target, self.zero_norm) for target in self.targets]).double().square()
        return torch.where(self.group_masks, squares, 0.0).sum(dim=1)  # index_add_ is not deterministic on CUDA

    def apply(self, coefficients: list[float]) -> None:
        """Perform or enable the updates of a step that is not skipped, given the clip coefficient of each group."""

    def record_norms(self, targets: list[Target], gradients: list[Tensor]) -> None:
        """Record the norms of these targets' gradient shards, replacing earlier ones."""
        self.norms.update(zip(targets, norms(gradients), strict=True))

    def update(
        self,
        targets: list[Target],
        gradients: list[Tensor],
        coefficients: list[float] | float | Tensor,
        squares: SquareSums | None = None,
    ) -> None:
        """Update targets with the rule; their gradient shards are overwritten.

        Args:
            coefficients: the clip coefficients of all groups, or one coefficient for all these targets.
            squares: see ``Rule.update``.
        """
        limit = self.clipping.limit(self.scale)
        for first, names, of_names in self._updated_alike(targets, gradients):
            coefficient = coefficients[first.group] if isinstance(coefficients, list) else coefficients
            lr, weight_decay = first.options["lr"], first.options["weight_decay"]
            for shards, shard_gradients in self.store.open_for_update(names, of_names):
                self.rule.update(shards, shard_gradients, coefficient / self.scale, lr, weight_decay, limit, squares)

    def _updated_alike(
        self, targets: list[Target], gradients: list[Tensor]
    ) -> list[tuple[Target, list[str], list[Tensor]]]:
        """Group targets with the same param group and clip coefficient: the first of each, names and gradients."""
        by_group = self.clipping.group_norm is not None
        same_update: dict[tuple[int, int], tuple[Target, list[str], list[Tensor]]] = {}
        for target, gradient in zip(targets, gradients, strict=True):
            key = (id(target.options), target.group if by_group else 0)
            _, names, of_names = same_update.setdefault(key, (target, [], []))
            names.append(target.name)
            of_names.append(gradient)
        return list(same_update.values())
