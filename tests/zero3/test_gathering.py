"""Tests of gathering: resident parameters, and gathers for a module or for a layer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_ds import zero3
from lomo_ds.errors import ConfigError
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.gathering import OnDemandGathering, ResidentGathering, choose_granularity
from tests.engines import make_engine, my_chunk, my_part, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counted[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives_in_a_step(granularity: str) -> Counter[str]:
    """Count the collectives of the fourth step, after those that DeepSpeed traces, without reuse or prefetch."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    engine = make_engine(tiny_model(), "stash", params={"gather_granularity": granularity}, zero_optimization=zero)
    batch = my_part(whole_batch(0, rows=2))
    for _ in range(3):
        engine.train_batch(batch)
    with Collectives() as collectives:
        engine.train_batch(batch)
    return collectives.counted


def test_a_layer_takes_one_collective(ranks: GroupOf) -> None:
    by_module = ranks(2).run(collectives_in_a_step, "module")[0]
    by_layer = ranks(2).run(collectives_in_a_step, "layer")[0]
    print(f"by module: {dict(by_module)}\nby layer: {dict(by_layer)}")
    # 2 layers of 9 modules with weights, in forward and in backward
    assert by_module["_allgather_base_"] - by_layer["_allgather_base_"] == 2 * 2 * (9 - 1)
    assert by_layer["_reduce_scatter_base_"] < 2 * 9, "gradients travel together"


class Copies(TorchDispatchMode):
    """Counts operations that copy or concatenate tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.cat, torch.ops.aten.clone)
        return func(*args, **(kwargs or {}))


def collectives_at_the_end_of_a_step() -> tuple[int, Counter[str]]:
    engine = make_engine(tiny_model(), "stash", threshold=25)
    gathering: Any = engine.optimizer.gathering
    places: list[list[int]] = []
    for step in range(2):
        engine.backward(engine(**my_part(whole_batch(step, rows=2))).loss)
        with Collectives() as collectives:
            engine.step()
        places.append([parameter.data_ptr() for parameter in gathering.persistent])
    assert places[0] == places[1], "the copies are written to again where they are"
    with Copies() as copies:
        gathering.refresh()
    lengths = len({ceil_div(zero3.full_shape(parameter).numel(), 2) for parameter in gathering.persistent})
    assert copies.count == 2 * lengths < 2 * len(gathering.persistent), "into the buffer, and out of it"
    return len(gathering.persistent), collectives.counted


def test_persistent_parameters_are_refreshed_in_one_collective(ranks: GroupOf) -> None:
    for persistent, counted in ranks(2).run(collectives_at_the_end_of_a_step):
        assert persistent > 1
        assert counted == {"_allgather_base_": 1, "allreduce_": 1}, "the norm, and the parameters"


@pytest.mark.parametrize(
    ("asked", "free_bytes", "chosen"),
    [("auto", 10**9, "layer"), ("auto", 10_000, "module"), ("module", 10**9, "module"), ("layer", 0, "layer")],
)
def test_auto_is_layer_if_two_layers_fit(asked: str, free_bytes: int, chosen: str) -> None:
    assert choose_granularity(asked, tiny_model(), free_bytes) == chosen


def test_containers_are_not_layers() -> None:
    pairs = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2)]) for _ in range(2)])
    assert choose_granularity("auto", torch.nn.ModuleDict({"layers": pairs}), 10**9) == "module"


def test_a_model_without_layers() -> None:
    model = torch.nn.Linear(2, 2)
    assert choose_granularity("auto", model, 10**9) == "module"
    with pytest.raises(ConfigError, match="none; use module"):
        choose_granularity("layer", model, 10**9)


def gathered_copies_after_a_step(threshold: int, granularity: str) -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = make_engine(model, "immediate", threshold, params={"gather_granularity": granularity})
    gathering: Any = engine.optimizer.gathering
    for step in range(2):
        engine.train_batch(my_part(whole_batch(step, rows=2)))
        persistent = {id(parameter) for parameter in gathering.persistent}
        assert bool(persistent) == (threshold > 0)
        for name, parameter in engine.module.named_parameters():
            shard = zero3.Shard.of(name, parameter).data
            if id(parameter) in persistent:
                assert torch.equal(my_chunk(parameter.detach()), shard), f"{name} is stale in forward"
                assert name != "model.norm.weight" or not torch.equal(shard, my_chunk(before[name])), "it trains"
            else:
                assert parameter.numel() == 0, f"{name} is still gathered"


@pytest.mark.parametrize("granularity", ["module", "layer"])
@pytest.mark.parametrize("threshold", [0, 25, 100_000])
def test_no_gathered_copy_is_stale_or_left_behind(ranks: GroupOf, threshold: int, granularity: str) -> None:
    ranks(2).run(gathered_copies_after_a_step, threshold, granularity)


def one_rank_gathers_nothing() -> None:
    engine = make_engine(tiny_model(), "immediate", threshold=0)
    assert isinstance(engine.optimizer.gathering, ResidentGathering)
    shards = {shard.name: shard.data for shard in zero3.shards(engine.module)}
    for name, parameter in engine.module.named_parameters():
        assert parameter.data_ptr() == shards[name].data_ptr(), "the shard is what forward reads"
    before = weights_of(engine)
    engine.train_batch(whole_batch(0, rows=2))
    # reading weights has taken them from the modules; forward has put them back, and a loose shard would not train
    assert not torch.equal(weights_of(engine)["model.norm.weight"], before["model.norm.weight"])
    with deepspeed.zero.GatheredParameters([engine.module.model.norm.weight], modifier_rank=0):
        engine.module.model.norm.weight.data.fill_(2.0)
    assert bool((engine.module.state_dict()["model.norm.weight"] == 2.0).all()), "what a user writes is in the shard"
    norm = engine.module.model.norm.weight
    loss = engine(**whole_batch(0, rows=2)).loss
    with deepspeed.zero.GatheredParameters([norm]):  # one alone, and between forward and backward
        assert bool((norm == 2.0).all())
    engine.backward(loss)
    engine.step()
    assert norm.data_ptr() == shards["model.norm.weight"].data_ptr(), "forward reads what the step has written"
    assert not bool((norm == 2.0).all())


def test_on_one_rank_shards_are_the_parameters(ranks: GroupOf) -> None:
    ranks(1).run(one_rank_gathers_nothing)


def offloaded_on_one_rank() -> bool:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    return isinstance(make_engine(tiny_model(), "stash", zero_optimization=zero).optimizer.gathering, OnDemandGathering)


def test_offloaded_parameters_are_gathered_on_one_rank_too(ranks: GroupOf) -> None:
    assert ranks(1).run(offloaded_on_one_rank) == [True]
