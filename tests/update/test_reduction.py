"""Reduction in buckets: every rank gets its shards of the sums, in order, with few gradients alive."""

from collections.abc import Callable

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor

from lomo_ds.update.gradient_parts import parts_of, without_shared_row
from lomo_ds.update.reduction import Reduction, interleave
from lomo_ds.update.target import Target
from tests.engines import my_chunk
from tests.ranks import Ranks
from tests.targets import flat_targets

GroupOf = Callable[..., Ranks]

SHAPES = [(40, 6), (1,), (5, 7), (2, 1), (3, 4), (1, 1), (64,), (40, 6)]  # larger than a bucket and much smaller


def gradient_of(index: int, rank: int) -> Tensor:
    """Return a gradient of small integers, whose sums are exact in any precision."""
    numel = torch.Size(SHAPES[index]).numel()
    return torch.arange(float(numel)).remainder(16).add(index + rank).view(SHAPES[index])


def reduce_all(dtypes: list[torch.dtype], reduce_dtype: torch.dtype | None, bucket_numel: int) -> tuple[int, list[int]]:
    """Reduce all gradients and check the shards; return the peak of waiting and in-flight elements, and the order."""
    order: list[int] = []
    peak = 0

    def check_shards(arrived: list[Target], shards: list[Tensor]) -> None:
        indices = [int(target.name) for target in arrived]
        for index, shard in zip(indices, shards, strict=True):
            expected = torch.stack([gradient_of(index, rank) for rank in range(dist.get_world_size())]).sum(dim=0)
            assert shard.dtype == (reduce_dtype or dtypes[index])
            assert torch.equal(shard.float(), my_chunk(expected))
        order.extend(indices)

    targets = [
        Target(str(index), torch.Size(shape), 0, my_chunk(torch.zeros(shape)).numel(), 0, {})
        for index, shape in enumerate(SHAPES)
    ]
    reduction = Reduction(targets, dist.get_world_group(), reduce_dtype, check_shards)
    buckets = reduction.buckets
    buckets.bucket_numel = min(buckets.bucket_numel, bucket_numel)
    buckets.alive_numel = max(target.full_numel for target in targets)
    for index, dtype in enumerate(dtypes):
        gradient = gradient_of(index, dist.get_rank()).to(dtype)
        transposed = gradient.t().contiguous().t() if gradient.dim() == 2 else gradient  # any layout is accepted
        reduction.add(targets[index], transposed)
        peak = max(peak, buckets.waiting_numel + reduction.in_flight_numel)
    reduction.flush()
    assert sorted(order) == list(range(len(SHAPES)))
    assert (buckets.waiting_numel, reduction.in_flight_numel) == (0, 0)
    return peak, order


@pytest.mark.parametrize("bucket_numel", [1, 50, 120])
@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_its_shard_of_the_sum(
    ranks: GroupOf, world_size: int, dtype: torch.dtype, reduce_dtype: torch.dtype | None, bucket_numel: int
) -> None:
    mixed = [dtype if index % 3 else torch.float32 for index in range(len(SHAPES))]
    for dtypes in ([dtype] * len(SHAPES), mixed):
        outcomes = ranks(world_size).run(reduce_all, dtypes, reduce_dtype, bucket_numel)
        for peak, order in outcomes:
            padding = len(SHAPES) * world_size
            assert order == outcomes[0][1], "the same on all ranks"
            assert peak <= 40 * 6 + padding, "no more than the largest gradient"


def test_interleave_pads_each_gradient_by_itself() -> None:
    gradients = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    parts = [parts_of(target, target.full_numel, 2) for target in flat_targets([3, 1])]
    assert interleave(gradients, parts).tolist() == [1.0, 2.0, 4.0, 3.0, 0.0, 0.0]
    single, (target,) = torch.ones(4), flat_targets([4])
    assert interleave([single], [parts_of(target, 4, 2)]).data_ptr() == single.data_ptr(), "it is not copied"


@pytest.mark.parametrize("shape", [(5, 4), (7, 3), (2, 3, 5), (1, 6), (3, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_each_rank_gets_the_rows_of_a_projection_that_its_slice_has_a_part_of(
    world_size: int, shape: tuple[int, ...]
) -> None:
    width = max(1, shape[-1] - 1) if shape[-1] > 1 else 1
    numel, rows = torch.Size(shape).numel(), torch.arange(float(torch.Size(shape).numel() // shape[-1]))
    projection = rows[:, None].expand(-1, width).reshape(-1)
    owned_rows = []
    for rank, part in enumerate(torch.arange(numel).split(-(-numel // world_size))):
        target = Target("a", torch.Size(shape), int(part[0]), int(part[-1]) + 1, 0, {})
        start, stop = parts_of(target, projection.numel(), world_size).bounds[rank]
        expected = torch.unique(part // shape[-1]).float()
        assert torch.equal(projection[start:stop].view(-1, width)[:, 0], expected)
        owned_rows += without_shared_row(target, projection[start:stop])[::width].tolist()
    if width < shape[-1]:
        assert sorted(owned_rows) == rows.tolist(), "each row counts once in the norm"
