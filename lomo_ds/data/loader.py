"""Distribution of sequences over ranks and steps: training micro-batches and evaluation batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.data.sequences import Item, Sequences, collate
from lomo_ds.numerics.flat import ceil_div

MicroBatches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Position:
    """Progress of training through the data, independent of the world size."""

    epoch: int = 0  # number of completed epochs
    consumed: int = 0  # sequences of the current epoch that are done, over all ranks


class TrainingSteps:
    """Iterator over this rank's micro-batches for every optimizer step, reshuffled each epoch.

    An epoch contains every sequence exactly once. Ranks take turns in one common order, so training can resume at any
    position with another world size. If an epoch ends within a step, all ranks still get the same number of
    micro-batches, padded with sequences whose labels are all ignored.

    Args:
        accumulation: number of micro-batches of ``batch_size`` sequences per step and rank.
        epochs: number of passes over ``sequences``; may be fractional.
        max_steps: total number of steps; if positive, it overrides ``epochs``.
        start: position from which to start, after ``step`` steps.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        epochs: float,
        max_steps: int = -1,
        start: Position | None = None,
        step: int = 0,
    ) -> None:
        self.sequences = sequences
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.sequences_per_step = batch_size * accumulation * world_size
        self.position = start or Position()
        self.step = step
        self.total_sequences = max(1, round(epochs * len(sequences))) if max_steps <= 0 else None
        self.total = max_steps if self.total_sequences is None else step + self._steps_left()

    @property
    def per_epoch(self) -> int:
        """Number of steps per epoch."""
        return ceil_div(len(self.sequences), self.sequences_per_step)

    @property
    def data(self) -> dict[str, Any]:
        """JSON values that identify the data and its order."""
        return {
            "sequences": len(self.sequences),
            "tokens in each": self.sequences.length,
            "digest": self.sequences.digest(),
            "seed": self.seed,
        }

    @property
    def epochs(self) -> float:
        """Number of completed passes over the data, including the fraction of the current one."""
        return self.position.epoch + self.position.consumed / len(self.sequences)

    @property
    def is_past_end(self) -> bool:
        """Return whether more sequences are done than training needs."""
        done = self.position.epoch * len(self.sequences) + self.position.consumed
        return self.total_sequences is not None and done > self.total_sequences

    @property
    def tokens(self) -> int:
        """Number of tokens that are done, over all ranks, without padding."""
        sizes, (epoch, consumed) = self.sequences.sizes, (self.position.epoch, self.position.consumed)
        done = _order(len(sizes), epoch, self.seed)[:consumed].numpy()
        return epoch * int(sizes.sum()) + int(sizes[done].sum())

    def __iter__(self) -> Iterator[MicroBatches]:
        """Yield the remaining steps; ``position`` and ``step`` are advanced before each step is yielded."""
        while self.step < self.total:
            count = min(self.sequences_per_step, self._sequences_in(self.position.epoch) - self.position.consumed)
            micro_batches = self._micro_batches(self.position, count)
            self.step += 1
            self.position = self._position_after(count)
            yield micro_batches

    def _micro_batches(self, position: Position, count: int) -> MicroBatches:
        order = _order(len(self.sequences), position.epoch, self.seed)
        indices = order[position.consumed : position.consumed + count].tolist()
        global_batch = self.batch_size * self.world_size
        firsts = range(self.rank * self.batch_size, ceil_div(count, global_batch) * global_batch, global_batch)
        return [
            collate([sequence_or_padding(self.sequences, indices, first + k) for k in range(self.batch_size)])
            for first in firsts
        ]

    def _position_after(self, count: int) -> Position:
        epoch, consumed = self.position.epoch, self.position.consumed + count
        return Position(epoch + 1, 0) if consumed == len(self.sequences) else Position(epoch, consumed)

    def _sequences_in(self, epoch: int) -> int:
        """Return the number of sequences of ``epoch`` that training uses; the last epoch may be partial."""
        size = len(self.sequences)
        return size if self.total_sequences is None else max(0, min(size, self.total_sequences - epoch * size))

    def _steps_left(self) -> int:
        left, epoch, consumed = 0, self.position.epoch, self.position.consumed
        while (sequences := self._sequences_in(epoch)) > consumed:
            left += ceil_div(sequences - consumed, self.sequences_per_step)
            epoch, consumed = epoch + 1, 0
        return left


def evaluation_batches(
    sequences: Sequences, batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's batches: each sequence occurs once over all ranks, and all ranks get equally many batches."""
    indices = range(len(sequences))
    global_batch = batch_size * world_size
    for first in range(rank * batch_size, ceil_div(len(sequences), global_batch) * global_batch, global_batch):
        yield collate([sequence_or_padding(sequences, indices, first + k) for k in range(batch_size)])


def sequence_or_padding(sequences: Sequences, indices: Sequence[int], position: int) -> Item:
    """Return the sequence at ``indices[position]``, or past the end one whose labels are all ignored.

    ZeRO-3 gathers a layer on all ranks at once, so a rank that has no data left must still take part.
    """
    if position < len(indices):
        return sequences[indices[position]]
    return {**sequences[0], "labels": torch.full_like(sequences[0]["labels"], IGNORE_INDEX)}


@lru_cache(maxsize=1)
def _order(size: int, epoch: int, seed: int) -> Tensor:
    """Return the int64 permutation of the sequences in an epoch, equal on every rank."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))
