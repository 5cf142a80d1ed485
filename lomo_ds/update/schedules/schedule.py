"""Base class of the update schedules: gradient norms, and the call that updates targets."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from lomo_ds.numerics.apply import Scalar
from lomo_ds.numerics.flat import norms
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.target import Target
from lomo_ds.update.updater import Updater


class StepPasses(Protocol):
    """Forward and backward passes over the batches of a step, as ``Schedule.run`` asks for them."""

    def backward(self, repeatable: bool = False) -> bool:
        """Run all micro-batches forward and backward; return False if the step must be skipped.

        Args:
            repeatable: whether ``repeat`` may follow.
        """
        ...

    def forward(self) -> Tensor | None:
        """Run all micro-batches forward, without gradients.

        Returns:
            The loss averaged over the items of all ranks; 0-dim, float64. None if the step must be skipped.
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
        updater: updates the shards of all trained parameters.
        clipping: the clipping settings.
    """

    passes = 1  # forward and backward passes per step
    updates_in_backward = False  # whether weights change before overflow and global norm are known
    keeps_gradients = False  # whether gradients can accumulate over several backward passes

    def __init__(self, updater: Updater, clipping: Clipping) -> None:
        self.updater = updater
        self.targets = updater.targets  # in the model's order
        self.clipping = clipping
        self.device = updater.device  # that gradients are computed on
        groups = torch.tensor([target.group for target in self.targets])
        self.group_masks = (groups == torch.arange(int(groups.max()) + 1)[:, None]).to(self.device)  # groups x targets
        self.zero_norm = torch.zeros((), dtype=torch.float32, device=self.device)
        self.start(scale=1.0)

    def start(self, scale: float) -> None:
        """Start a step, discarding everything that remains from the previous one."""
        self.scale = scale
        self.norms: dict[Target, Tensor] = {}  # of the gradient shards that arrived, 0-dim float32
        self.updater.start()

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
        self.updater.flush()

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each clipping group over this rank's shards, float64, times ``scale`` squared."""
        squares = torch.stack([self.norms.get(target, self.zero_norm) for target in self.targets]).double().square()
        return torch.where(self.group_masks, squares, 0.0).sum(dim=1)  # index_add_ is not deterministic on CUDA

    def apply(self, coefficients: list[float]) -> None:
        """Perform or enable the updates of a step that is not skipped, given the clip coefficient of each group."""

    def record_norms(self, targets: list[Target], gradients: list[Tensor]) -> None:
        """Record the norms of these targets' gradient shards, replacing earlier ones."""
        owned = [self.updater.owned_part(target, gradient) for target, gradient in zip(targets, gradients, strict=True)]
        self.norms.update(zip(targets, norms(owned), strict=True))

    def update(
        self,
        targets: list[Target],
        gradients: list[Tensor],
        coefficients: list[float] | float | Tensor,
        squares: SquareSums | None = None,
    ) -> None:
        """Update targets; their gradient shards are overwritten.

        Args:
            coefficients: the clip coefficients of all groups, or one coefficient for all these targets.
            squares: see ``Updater.update``.
        """
        if isinstance(coefficients, list):
            scales: list[Scalar] = [coefficients[target.group] / self.scale for target in targets]
        else:
            scales = [coefficients / self.scale] * len(targets)
        self.updater.update(targets, gradients, scales, self.clipping.limit(self.scale), squares)
