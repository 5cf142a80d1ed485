"""The updater: runs the rules on gradient shards, sums over the ranks what they ask for, and applies their updates.

The sums of a bucket travel in one all-reduce behind its reduce-scatter, and backward continues meanwhile: they are
received when the next bucket arrives. A bucket whose rules ask for two sums one after the other is thus applied two
buckets later, and each bucket costs one all-reduce. A rule without sums is applied at once; so is every rule on one
rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import start_all_reduce
from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.numerics.apply import PieceOfDirection, Scalar, Update, allocate_square_sums, apply
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.gradient_parts import without_shared_row
from lomo_ds.update.rule_states import RuleStates
from lomo_ds.update.rules import Gradient, Rule, SumsOverRanks
from lomo_ds.update.target import Target
from lomo_ds.zero3.stores import Store


@dataclass
class _Waiting:
    """A target whose rule waits for a sum over the ranks."""

    target: Target
    values: Values
    sums: SumsOverRanks
    partial: Tensor  # this rank's part of the sum, 1-D fp32


class Updater:
    """Updates shards in ``store`` from gradient shards.

    Args:
        targets: all trained parameters.
        rules: the rule of each target, by its name.
        store: holds the shards.
        noise: for stochastic rounding; None rounds to nearest.
        process_group: the ranks that parameters are partitioned over.
        device: the compute device.

    Attributes:
        step: number of the current step, from 1; steps that were skipped do not count.
    """

    def __init__(
        self,
        targets: list[Target],
        rules: dict[str, Rule],
        store: Store,
        noise: RoundingNoise | None,
        process_group: ProcessGroup,
        device: torch.device,
    ) -> None:
        self.targets = targets
        self.rules = rules
        self.store = store
        self.noise = noise
        self.process_group = process_group
        self.device = device
        self.world_size = torch.distributed.get_world_size(process_group)
        self.states = RuleStates(targets, rules, self.world_size, device)
        self.step = 1
        self._reset()

    def allocate_square_sums(self) -> SquareSums | None:
        """Allocate a step's sums of squared gradients; None if applying the updates cannot compute them."""
        if not all(rule.follows_gradient for rule in self.rules.values()):
            return None
        return allocate_square_sums([target.numel for target in self.targets], self.device)

    def padded_numel(self, target: Target) -> int:
        """Return the elements of a slice with padding, which is equal on all ranks."""
        return ceil_div(target.full_numel, self.world_size)

    def start(self) -> None:
        """Start a step, discarding everything that an interrupted one has left."""
        self._reset()
        self.store.flush()

    def project(self, target: Target, gradient: Tensor) -> Tensor:
        """Return what must be summed over the ranks: the gradient of the full parameter, or its projection."""
        projected = self.rules[target.name].project(target, gradient, self.states.values[target.name], self.step)
        if projected is None:
            return gradient
        self.projected.add(target)
        return projected

    def owned_part(self, target: Target, part: Tensor) -> Tensor:
        """Return the elements of this rank's part of a sum that no lower rank has received too."""
        return without_shared_row(target, part) if target in self.projected else part

    def update(
        self,
        targets: Sequence[Target],
        gradients: Sequence[Tensor | PieceOfDirection],
        scales: Sequence[Scalar],
        limit: float | None,
        squares: SquareSums | None = None,
    ) -> None:
        """Update targets, now or when the sums over ranks have arrived; gradients are overwritten.

        All ranks must pass the same targets in the same order.

        Args:
            gradients: this rank's parts, 1-D; or functions that compute a piece of them.
            scales, limit: see ``Gradient``; one scale for each target.
            squares: receives the sums of squares of the gradients, see ``allocate_square_sums``.
        """
        self.store.announce([target.name for target in targets])
        for batch in self._batches(targets):
            self._receive_sums()
            for index in batch:
                self._begin(targets[index], Gradient(gradients[index], scales[index], limit), squares)
            self._apply(squares)
            self._send_sums()

    def flush(self) -> None:
        """End a pass: apply all updates, and wait for the store's copies."""
        while self.waiting:
            self._receive_sums()
            self._send_sums()
        self.store.flush()

    def _reset(self) -> None:
        self.waiting: list[_Waiting] = []
        self.pending: tuple[Tensor, Any] | None = None  # sums in flight, of all that wait, and their handle
        self.ready: list[tuple[Target, Values, Update]] = []
        self.projected: set[Target] = set()  # targets whose gradient was projected in this step

    def _batches(self, targets: Sequence[Target]) -> Iterator[range]:
        """Split targets so that the shards that a batch borrows fit into the memory for copies in flight."""
        if self.store.in_place or self.world_size == 1:
            yield range(len(targets))
            return
        first, nbytes = 0, 0
        for index, target in enumerate(targets):
            nbytes += torch.float32.itemsize * self.padded_numel(target)
            if nbytes >= IN_FLIGHT_BYTES:
                yield range(first, index + 1)
                first, nbytes = index + 1, 0
        yield range(first, len(targets))

    def _begin(self, target: Target, gradient: Gradient, squares: SquareSums | None) -> None:
        """Run the rule of a target up to its update or to its first sum over the ranks."""
        values = self.store.lend(target.name)
        rule, state = self.rules[target.name], self.states.values[target.name]
        outcome = rule.update(target, values, gradient, state, self.step)
        if isinstance(outcome, Update):
            self._finish(target, values, outcome, squares)
        else:
            self._continue(target, values, outcome, None)

    def _continue(self, target: Target, values: Values, sums: SumsOverRanks, total: Tensor | None) -> None:
        """Give a rule the sum it waits for, and keep the next one that it asks for."""
        try:
            partial = next(sums) if total is None else sums.send(total)
            while self.world_size == 1:
                partial = sums.send(partial)
        except StopIteration as end:
            self._finish(target, values, end.value, None)
            return
        self.waiting.append(_Waiting(target, values, sums, partial))

    def _finish(self, target: Target, values: Values, update: Update, squares: SquareSums | None) -> None:
        self.ready.append((target, values, update))
        if not self.store.in_place:  # frees the borrowed shard
            self._apply(squares)

    def _apply(self, squares: SquareSums | None = None) -> None:
        """Apply the updates that are ready, all that are alike together."""
        ready, self.ready = self.ready, []
        apply([(values, update) for _, values, update in ready], self.noise, squares)
        for target, _, _ in ready:
            self.store.commit(target.name)

    def _send_sums(self) -> None:
        """Start the sum over the ranks of everything that rules wait for."""
        if self.waiting:
            flat = torch.cat([waiting.partial for waiting in self.waiting])
            self.pending = flat, start_all_reduce(flat, self.process_group)

    def _receive_sums(self) -> None:
        """Give the rules the sums that they wait for; on CUDA only the current stream waits."""
        if self.pending is None:
            return
        (flat, work), self.pending = self.pending, None
        work.wait()
        waiting, self.waiting = self.waiting, []
        totals = flat.split([entry.partial.numel() for entry in waiting])
        for entry, total in zip(waiting, totals, strict=True):
            self._continue(entry.target, entry.values, entry.sums, total)
        self._apply()
