"""Which rank sees which block, and when."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lomo_ds.data.packing import PackedBlocks
from lomo_ds.loss import IGNORE_INDEX


def training_loader(
    blocks: PackedBlocks, batch_size: int, rank: int, world_size: int, seed: int
) -> tuple[StatefulDataLoader, StatefulDistributedSampler]:
    """Batches of this rank, shuffled anew each epoch (``sampler.set_epoch``), equally many on every rank."""
    sampler = StatefulDistributedSampler(blocks, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
    return StatefulDataLoader(blocks, batch_size=batch_size, sampler=sampler), sampler


def evaluation_batches(
    blocks: PackedBlocks, batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of this rank, every block once over all ranks, equally many batches of one shape on every rank.

    ZeRO-3 gathers a layer on all ranks at once, so a rank that has run out takes part with blocks whose labels
    are all ignored.
    """
    rounds = -(-len(blocks) // (batch_size * world_size))
    for round_ in range(rounds):
        first = (round_ * world_size + rank) * batch_size
        yield default_collate([_block_or_filler(blocks, first + offset) for offset in range(batch_size)])


def _block_or_filler(blocks: PackedBlocks, index: int) -> dict[str, Tensor]:
    if index < len(blocks):
        return blocks[index]
    return {**blocks[0], "labels": torch.full_like(blocks[0]["labels"], IGNORE_INDEX)}
