"""Immediate schedule: updates each shard as soon as its gradient arrives, and keeps no gradients."""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules.schedule import Schedule
from lomo_ds.update.target import Target
from lomo_ds.update.updater import Updater


class Immediate(Schedule):
    """One pass without stored gradients; group-norm clipping holds the shards of a group until it is complete."""

    updates_in_backward = True

    def __init__(self, updater: Updater, clipping: Clipping) -> None:
        self.group_sizes = Counter(target.group for target in updater.targets)
        self.waiting: dict[int, dict[Target, Tensor]] = defaultdict(dict)  # gradient shards by clipping group
        self.squares: SquareSums | None = None  # sums that kernels compute; None if norms are computed separately
        if clipping.group_norm is None:
            self.squares = updater.allocate_square_sums()
        super().__init__(updater, clipping)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.waiting.clear()
        if self.squares is not None:
            self.squares.clear()

    def offer_gathered_weight(self, target: Target, weight: Tensor) -> None:
        self.updater.store.offer_gathered_weight(target.name, weight)

    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        if self.squares is None:
            self.record_norms(targets, gradients)
        if self.clipping.group_norm is None:
            self.update(targets, gradients, 1.0, self.squares)
            return
        for target, gradient in zip(targets, gradients, strict=True):
            waiting = self.waiting[target.group]
            waiting[target] = gradient
            if len(waiting) == self.group_sizes[target.group]:
                self._update_group(target.group)

    def flush(self) -> None:
        for group in sorted(self.waiting):  # groups in which this batch did not use every parameter
            self._update_group(group)
        super().flush()

    def squared_norms(self) -> Tensor:
        if self.squares is None:
            return super().squared_norms()
        groups = len(self.group_masks)  # without group clipping only the total is needed, so it goes to the first group
        return torch.nn.functional.pad(self.squares.total()[None], (0, groups - 1))

    def _update_group(self, group: int) -> None:
        gradients = self.waiting.pop(group)
        norms = torch.stack([self.norms[target] for target in gradients])
        squared_norm = norms.double().square().sum(dim=0, keepdim=True)
        total = all_reduce_sum(squared_norm, self.updater.process_group) / self.scale**2
        coefficient = self.clipping.coefficients(total)[0]
        self.update(list(gradients), list(gradients.values()), coefficient)
