"""Shards and gathered copies under real ZeRO-3."""

from collections.abc import Callable

import pytest
import torch

from lomo_ds import zero3
from tests.engines import make_engine, my_chunk
from tests.ranks import Ranks
from tests.reference import tiny_model

GroupOf = Callable[..., Ranks]


def shards_make_the_whole() -> dict[str, int]:
    model = tiny_model()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = make_engine(model, threshold=0)
    sizes = {}
    for name, parameter in engine.module.named_parameters():
        shard = zero3.Shard.of(name, parameter)
        assert zero3.full_shape(parameter) == whole[name].shape
        assert torch.equal(shard.data, my_chunk(whole[name]))
        sizes[name] = shard.data.numel()
    return sizes


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_shards_are_the_whole_without_padding(ranks: GroupOf, world_size: int) -> None:
    sizes = ranks(world_size).run(shards_make_the_whole)
    for name, parameter in tiny_model().named_parameters():
        assert sum(shard[name] for shard in sizes) == parameter.numel()
    assert [shard["gain"] for shard in sizes] == [1] + [0] * (world_size - 1), "smaller than the world"


def partition_one_by_one() -> int:
    """Each rank fills its own shard of a model that has no memory yet; the largest number of whole parameters."""
    truth = dict(tiny_model(seed=99).named_parameters())
    with torch.device("meta"):
        model = tiny_model()
    model.tie_weights()
    whole_at_once = 0
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for shard in zero3.partition(model, ds_config, torch.bfloat16):
        assert shard.shape == truth[shard.name].shape
        shard.data.copy_(truth[shard.name].detach().flatten()[shard.start : shard.stop])
        split = [other for other in model.parameters() if hasattr(other, "ds_tensor")]
        whole_at_once = max(whole_at_once, sum(other.numel() > 0 for other in split))
    for name, parameter in model.named_parameters():
        assert torch.equal(zero3.Shard.of(name, parameter).data, my_chunk(truth[name].detach().bfloat16()))
        assert parameter.requires_grad == truth[name].requires_grad
    return whole_at_once


def test_partition_leaves_no_parameter_whole(ranks: GroupOf) -> None:
    assert ranks(2).run(partition_one_by_one) == [0, 0]
