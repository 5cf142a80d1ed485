"""Tests of stores: the bytes that cross the link to the host, and the values that are opened for update."""

import itertools
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.errors import ConfigError
from lomo_ds.memory import budget
from lomo_ds.memory.host_memory import SMALLEST_SLAB, Fetch, HostTransfer, PinnedMemory, Slabs, storage_bytes
from lomo_ds.models import meta_model
from lomo_ds.models.presets import preset_config
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3 import Shard
from lomo_ds.zero3.stores import HostStore
from tests.engines import make_engine
from tests.host_memory import same_from_host_memory
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
CPU = torch.device("cpu")


class Watched(HostTransfer):
    """Counts the bytes of copies."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.fetched = self.offloaded = 0

    def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
        self.offloaded += tensor.nbytes
        super().offload(tensor, host_tensor)

    def start_fetch(self, host_tensor: Tensor) -> Fetch:
        self.fetched += host_tensor.nbytes
        return super().start_fetch(host_tensor)


def bytes_carried(schedule: str, granularity: str) -> tuple[float, float]:
    """Bytes that a step's updates bring up from host memory and take down to it, in units of this rank's shards."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 25, "offload_param": {"device": "cpu"}}
    engine = make_engine(tiny_model(), schedule, params={"gather_granularity": granularity}, zero_optimization=zero)
    store: Any = engine.schedule.updater.store
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    shards = sum(s.data.nbytes for name, s in zip(names, store.shards.values(), strict=True) if name != "unused")
    engine.train_batch(part(whole_batch(0, rows=2), dist.get_rank(), dist.get_world_size()))
    store.transfer = store.prefetcher.transfer = Watched()
    engine.train_batch(part(whole_batch(1, rows=2), dist.get_rank(), dist.get_world_size()))
    assert not store.gathered
    assert not store.transfer.offloads
    return store.transfer.fetched / shards, store.transfer.offloaded / shards


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


def test_a_shard_is_updated_in_the_gathered_copy_or_in_a_fetched_one() -> None:
    homes = [torch.arange(10.0), torch.arange(10.0)]
    group: Any = None
    store = HostStore(
        [Shard(name, home, 10, torch.Size([5, 6]), group, home) for name, home in zip("ab", homes, strict=True)], CPU
    )
    whole = torch.arange(30.0) + 100
    store.offer_gathered_weight("a", whole.view(5, 6))
    lent = []
    store.announce("ab")
    for name in "ab":
        values = store.lend(name)
        assert isinstance(values, Tensor)
        lent.append(values.clone())
        values -= 1
        store.commit(name)
    store.flush()
    assert [values.tolist() for values in lent] == [list(range(110, 120)), list(range(10))]
    assert homes[0].tolist() == list(range(109, 119))
    assert homes[1].tolist() == list(range(-1, 9))
    assert torch.equal(whole, torch.arange(30.0) + 100), "of a copy that others read too, a part is copied"


def test_tensors_share_slabs_and_never_overlap() -> None:
    memory = PinnedMemory(CPU, total=300 * 64)
    small = [memory.empty_like(torch.empty(3, dtype=torch.bfloat16)) for _ in range(300)]
    for number, tensor in enumerate(small):
        tensor.fill_(float(number % 7))
    assert [tensor.tolist() for tensor in small] == [[float(number % 7)] * 3 for number in range(300)]
    assert storage_bytes(small) == SMALLEST_SLAB


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 2**29), min_size=1, max_size=200))
def test_slabs_are_powers_of_two_and_large_enough(sizes: list[int]) -> None:
    slabs = Slabs(sum(sizes))
    places = [slabs.place(size) for size in sizes]
    assert all(size == 1 << (size.bit_length() - 1) for size in slabs.sizes)
    for slab, of_slab in enumerate(slabs.sizes):
        parts = sorted(
            (start, start + size) for (where, start), size in zip(places, sizes, strict=True) if where == slab
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(parts))
        assert parts[-1][1] <= of_slab
    # the worst order: next to nothing opens a slab for all that is expected, which the rest does not fit into
    assert sum(slabs.sizes) <= 4 * (sum(sizes) + 64 * len(sizes)) + SMALLEST_SLAB


@pytest.mark.parametrize("model", ["7b", "13b", "65b"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_shards_of_llamas_fill_their_slabs(model: str, ranks: int) -> None:
    sizes = [2 * ceil_div(p.numel(), ranks) for p in meta_model(preset_config(model), torch.bfloat16).parameters()]
    slabs = Slabs(sum(sizes))
    for size in sizes:
        slabs.place(size)
    assert sum(slabs.sizes) < 1.04 * sum(sizes), "pinned one by one they would take up to twice as much"


def refused_before_anything_is_allocated(weights: str) -> str:
    """A host with 100 KB for each rank, of which 80 may be pinned."""
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    system: Any = budget.psutil
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


def test_pinned_host_memory_is_limited(ranks: GroupOf) -> None:
    for output in ranks(1).run(refused_before_anything_is_allocated, "auto"):
        assert "offload_param.device cpu needs 0.2 MiB of pinned host memory a rank, and of 0.1 MiB" in output
        assert "weights int8 need about half of it" in output
    for output in ranks(1).run(refused_before_anything_is_allocated, "int8"):
        assert output == "fits"


@pytest.mark.parametrize("schedule", ["immediate", "stash"])
def test_host_memory_gives_the_same_bits(ranks: GroupOf, schedule: str) -> None:
    ranks(1).run(same_from_host_memory, 32, 3, schedule)
