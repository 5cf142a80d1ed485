"""Update each shard as soon as its gradient arrives: one parameter's gradient is alive at a time."""

from collections import Counter, defaultdict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.clipping import Clipping
from lomo_ds.distributed import agree
from lomo_ds.numerics import squared_norm
from lomo_ds.rules import Rule
from lomo_ds.schedules.base import Schedule, Target


class Immediate(Schedule):
    """One pass, nothing kept; with group-norm clipping, the shards of one group are kept until it is complete."""

    updates_in_backward = True

    def __init__(
        self, targets: list[Target], rule: Rule, clipping: Clipping, device: torch.device, ranks: ProcessGroup
    ) -> None:
        super().__init__(targets, rule, clipping, device)
        self.ranks = ranks
        self.members = Counter(target.group for target in targets)
        self.waiting: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.waiting.clear()

    def take(self, index: int, gradient: Tensor) -> None:
        self.add_to_norm(index, gradient)
        if self.clipping.group_norm is None:
            self.update(index, gradient, coefficient=1.0)
            return
        group = self.targets[index].group
        self.waiting[group].append((index, gradient))
        if len(self.waiting[group]) == self.members[group]:
            self._update_group(group)

    def flush(self) -> None:
        for group in sorted(self.waiting):  # groups with a parameter that this batch did not use
            self._update_group(group)

    def _update_group(self, group: int) -> None:
        gradients = self.waiting.pop(group)
        squared = torch.stack([squared_norm(gradient) for _, gradient in gradients]).sum(dim=0, keepdim=True)
        coefficient = self.clipping.coefficients(agree(squared, self.ranks) / self.scale**2)[0]
        for index, gradient in gradients:
            self.update(index, gradient, coefficient)
