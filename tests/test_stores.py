"""Shards that are kept elsewhere: what crosses the link to them, and what is lent in their place."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor

from lomo_ds import memory
from lomo_ds.errors import ConfigError
from lomo_ds.host_memory import FIRST_SLAB_BYTES, Ferry, PinnedMemory, bytes_of
from lomo_ds.stores import InHostMemory
from lomo_ds.zero3 import Shard
from tests.engines import make_engine
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
CPU = torch.device("cpu")


class Watched(Ferry):
    """Counts what a ferry carries."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.carried_up = self.carried_down = 0

    def down(self, tensor: Tensor, home: Tensor) -> None:
        self.carried_down += tensor.nbytes
        super().down(tensor, home)

    def up(self, homes: Iterable[Tensor]) -> Iterator[Tensor]:
        for tensor in super().up(homes):
            self.carried_up += tensor.nbytes
            yield tensor


def bytes_carried(schedule: str, granularity: str) -> tuple[float, float]:
    """Bytes that a step's updates bring up from host memory and take down to it, in units of this rank's shards."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 25, "offload_param": {"device": "cpu"}}
    engine = make_engine(tiny_model(), schedule, params={"gather_granularity": granularity}, zero_optimization=zero)
    store: Any = engine.schedule.store
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    shards = sum(s.data.nbytes for name, s in zip(names, store.shards, strict=True) if name != "unused")
    engine.train_batch(part(whole_batch(0, rows=2), dist.get_rank(), dist.get_world_size()))
    store.ferry = Watched()
    engine.train_batch(part(whole_batch(1, rows=2), dist.get_rank(), dist.get_world_size()))
    assert not store.at_hand
    assert not store.ferry.leaving
    return store.ferry.carried_up / shards, store.ferry.carried_down / shards


@pytest.mark.parametrize(
    ("schedule", "up"),
    [
        ("immediate", 0.0),  # from the copies that backward has gathered
        ("two_pass", 0.0),
        ("stash", 1.0),  # the norm is known when they are gone
    ],
)
@pytest.mark.parametrize("granularity", ["module", "layer"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_in_backward_reads_nothing_back(
    ranks: GroupOf, world_size: int, granularity: str, schedule: str, up: float
) -> None:
    assert ranks(world_size).run(bytes_carried, schedule, granularity) == [(up, 1.0)] * world_size


def test_a_shard_is_lent_from_the_gathered_copy_or_from_its_home() -> None:
    homes = [torch.arange(10.0), torch.arange(10.0)]
    group: Any = None
    store = InHostMemory([Shard("", home, 10, torch.Size([5, 6]), group, home) for home in homes], CPU)
    whole = torch.arange(30.0) + 100
    store.note_whole(0, whole.view(5, 6))
    gradients = [torch.ones(10), torch.ones(10)]
    lent = []
    for (values,), (gradient,) in store.lend([0, 1], gradients):
        assert isinstance(values, Tensor)
        lent.append(values.clone())
        values -= gradient
    store.flush()
    assert [values.tolist() for values in lent] == [list(range(110, 120)), list(range(10))]
    assert homes[0].tolist() == list(range(109, 119))
    assert homes[1].tolist() == list(range(-1, 9))
    assert torch.equal(whole, torch.arange(30.0) + 100), "of a copy that others read too, a part is copied"


def test_memory_is_pinned_in_slabs_that_grow() -> None:
    memory = PinnedMemory(CPU)
    small = [memory.like(torch.empty(3, dtype=torch.bfloat16)) for _ in range(100)]
    assert bytes_of(small) == FIRST_SLAB_BYTES
    small[0].fill_(1.0)
    small[1].fill_(2.0)
    assert small[0].tolist() == [1.0] * 3, "no two overlap"
    large = memory.like(torch.empty(FIRST_SLAB_BYTES, dtype=torch.bfloat16))
    assert bytes_of([large]) == 2 * FIRST_SLAB_BYTES
    assert bytes_of([*small, large]) == 3 * FIRST_SLAB_BYTES


def refused_before_anything_is_allocated(weights: str) -> str:
    """A host with 100 KB for each rank, of which 80 may be pinned."""
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    system: Any = memory.psutil
    measured, system.virtual_memory = system.virtual_memory, lambda: Available
    model = torch.nn.Linear(400, 100)
    try:
        make_engine(model, params={"weights": weights}, zero_optimization=zero)
    except ConfigError as error:
        assert not hasattr(model.weight, "ds_tensor")
        return str(error)
    finally:
        system.virtual_memory = measured
    return "fits"


class Available:
    available = 100_000


def test_host_memory_is_a_budget(ranks: GroupOf) -> None:
    for told in ranks(1).run(refused_before_anything_is_allocated, "auto"):
        assert "offload_param.device cpu needs 0.2 MiB of pinned host memory a rank, and of 0.1 MiB" in told
        assert "weights int8 need about half of it" in told
    for told in ranks(1).run(refused_before_anything_is_allocated, "int8"):
        assert told == "fits"
