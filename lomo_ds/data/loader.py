"""Which rank sees which block, and when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lomo_ds.data.packing import IGNORE_INDEX, PackedBlocks
from lomo_ds.numerics.flat import ceil_div

MicroBatches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Position:
    """How far training has come in its data, whatever the number of ranks."""

    epoch: int = 0  # whole passes that are done
    consumed: int = 0  # sequences of the next one that are done, over all ranks


class TrainingSteps:
    """The micro-batches of this rank for every optimizer step, shuffled anew each epoch.

    An epoch holds every sequence exactly once. Ranks take turns in one common order, so that another number of ranks
    can go on anywhere in it. Where an epoch ends within a step, all ranks have as many micro-batches of one shape,
    filled up with sequences whose labels are all ignored.

    Args:
        accumulation: micro-batches of ``batch_size`` sequences per step and rank.
        epochs: passes over ``blocks``, the last of which may be a part of one.
        max_steps: number of steps in all; above 0 it overrides ``epochs``.
        start: where to begin, after ``step`` steps.
    """

    def __init__(
        self,
        blocks: PackedBlocks,
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
        self.blocks = blocks
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.sequences = batch_size * accumulation * world_size  # of one step
        self.position = start or Position()
        self.step = step
        self.wanted = max(1, round(epochs * len(blocks))) if max_steps <= 0 else None  # sequences in all
        self.total = max_steps if self.wanted is None else step + self._steps_left()

    @property
    def per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return ceil_div(len(self.blocks), self.sequences)

    @property
    def data(self) -> dict[str, Any]:
        """By which the order of the data is known again, as JSON."""
        return {
            "sequences": len(self.blocks),
            "tokens in each": self.blocks.length,
            "digest": self.blocks.digest(),
            "seed": self.seed,
        }

    @property
    def epochs(self) -> float:
        """Passes over the data that are done."""
        return self.position.epoch + self.position.consumed / len(self.blocks)

    @property
    def is_past_end(self) -> bool:
        """Whether more sequences are done than are wanted."""
        done = self.position.epoch * len(self.blocks) + self.position.consumed
        return self.wanted is not None and done > self.wanted

    @property
    def tokens(self) -> int:
        """Tokens that are done, over all ranks."""
        return (self.position.epoch * len(self.blocks) + self.position.consumed) * self.blocks.length

    def __iter__(self) -> Iterator[MicroBatches]:
        """What is left to do; ``position`` and ``step`` are already those behind the step that is handed out."""
        while self.step < self.total:
            count = min(self.sequences, self._end_of_epoch(self.position.epoch) - self.position.consumed)
            micro_batches = self._micro_batches(self.position, count)
            self.step += 1
            self.position = self._behind(count)
            yield micro_batches

    def _micro_batches(self, position: Position, count: int) -> MicroBatches:
        order = _order(len(self.blocks), position.epoch, self.seed)
        indices = order[position.consumed : position.consumed + count].tolist()
        turn = self.batch_size * self.world_size
        firsts = range(self.rank * self.batch_size, ceil_div(count, turn) * turn, turn)
        return [
            default_collate([block_or_padding(self.blocks, indices, first + k) for k in range(self.batch_size)])
            for first in firsts
        ]

    def _behind(self, count: int) -> Position:
        epoch, consumed = self.position.epoch, self.position.consumed + count
        return Position(epoch + 1, 0) if consumed == len(self.blocks) else Position(epoch, consumed)

    def _end_of_epoch(self, epoch: int) -> int:
        """Sequences of an epoch that are wanted."""
        size = len(self.blocks)
        return size if self.wanted is None else max(0, min(size, self.wanted - epoch * size))

    def _steps_left(self) -> int:
        left, epoch, consumed = 0, self.position.epoch, self.position.consumed
        while (wanted := self._end_of_epoch(epoch)) > consumed:
            left += ceil_div(wanted - consumed, self.sequences)
            epoch, consumed = epoch + 1, 0
        return left


def evaluation_batches(
    blocks: PackedBlocks, batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of this rank, every block once over all ranks, equally many batches of one shape on every rank."""
    everything = range(len(blocks))
    turn = batch_size * world_size
    for first in range(rank * batch_size, ceil_div(len(blocks), turn) * turn, turn):
        yield default_collate([block_or_padding(blocks, everything, first + k) for k in range(batch_size)])


def block_or_padding(blocks: PackedBlocks, indices: Sequence[int], place: int) -> dict[str, Tensor]:
    """The block at ``place`` of ``indices``; behind their end, one whose labels are all ignored.

    ZeRO-3 gathers a layer on all ranks at once, so a rank that has run out must take part.
    """
    if place < len(indices):
        return blocks[indices[place]]
    return {**blocks[0], "labels": torch.full_like(blocks[0]["labels"], IGNORE_INDEX)}


@lru_cache(maxsize=1)
def _order(size: int, epoch: int, seed: int) -> Tensor:
    """The order of an epoch, the same on every rank; int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))
