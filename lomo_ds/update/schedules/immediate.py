"""Update each shard as soon as its gradient is there: no more than two parameters' gradients are ever alive."""

from collections import Counter, defaultdict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.rules import Rule
from lomo_ds.update.schedules.schedule import Schedule, Target
from lomo_ds.zero3.stores import Store


class Immediate(Schedule):
    """One pass, nothing kept; with group-norm clipping, the shards of one group are kept until it is complete."""

    updates_in_backward = True

    def __init__(
        self,
        targets: list[Target],
        store: Store,
        rule: Rule,
        clipping: Clipping,
        device: torch.device,
        ranks: ProcessGroup,
    ) -> None:
        self.ranks = ranks
        self.sizes = Counter(target.group for target in targets)
        self.waiting: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by group and target
        self.squares: SquareSums | None = None  # of this step, where an update need not know them
        if clipping.group_norm is None:
            self.squares = rule.square_sums([target.numel for target in targets], device)
        super().__init__(targets, store, rule, clipping, device)

    def start(self, scale: float) -> None:
        super().start(scale)
        self.waiting.clear()
        if self.squares is not None:
            self.squares.clear()

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        self.store.offer_gathered_weight(index, whole)

    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        if self.squares is None:
            self.note_norms(indices, gradients)
        if self.clipping.group_norm is None:
            self.update(indices, gradients, 1.0, self.squares)
            return
        for index, gradient in zip(indices, gradients, strict=True):
            group = self.targets[index].group
            self.waiting[group][index] = gradient
            if len(self.waiting[group]) == self.sizes[group]:
                self._update_group(group)

    def flush(self) -> None:
        for group in sorted(self.waiting):  # groups with a parameter that this batch did not use
            self._update_group(group)
        super().flush()

    def measure(self) -> Tensor:
        if self.squares is None:
            return super().measure()
        groups = len(self.members)  # of which nothing but the sum is asked where no group is clipped
        return torch.nn.functional.pad(self.squares.total()[None], (0, groups - 1))

    def _update_group(self, group: int) -> None:
        gradients = self.waiting.pop(group)
        squared = torch.stack([self.norms[index] for index in gradients]).double().square().sum(dim=0, keepdim=True)
        coefficient = self.clipping.coefficients(all_reduce_sum(squared, self.ranks) / self.scale**2)[0]
        self.update(list(gradients), list(gradients.values()), coefficient)
