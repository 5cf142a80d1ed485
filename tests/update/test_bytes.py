"""Counted promises of the design: gradients alive during backward, and bytes communicated per step."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_ds.update.buckets import MIN_BUCKET_NUMEL
from tests.engines import make_engine
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
KEEPS_NOTHING = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}


def build_model(layers: int = 4, width: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 * width**3,
        hidden_size=64 * width,
        intermediate_size=172 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    return {"input_ids": ids, "labels": ids}


class WireBytes(TorchDispatchMode):
    """Counts calls and bytes of each collective: the full tensor, or twice the tensor for an all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max((tensor.nbytes for tensor in tensors), default=0)
            self.counted[name] += 2 * largest if "allreduce" in name else largest
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def traffic(schedule: str, threshold: int, large: bool) -> tuple[float, dict[str, int]]:
    """Return the bytes of the fourth step (DeepSpeed traces the first ones), in units of all parameters' bytes.

    DeepSpeed keeps up to a billion gathered elements from forward to backward; ``large`` makes it treat this model as
    larger than that.
    """
    model = build_model()
    parameter_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    if large:
        zero |= KEEPS_NOTHING
    engine = make_engine(model, schedule, bf16={"enabled": True}, zero_optimization=zero)
    for _ in range(3):
        engine.train_batch(batch())
    with WireBytes() as wire:
        engine.train_batch(batch())
    return sum(wire.counted.values()) / parameter_bytes, dict(wire.counted)


@pytest.mark.parametrize(("threshold", "large"), [(0, True), (100, True), (100, False), (100_000, False)])
@pytest.mark.parametrize(("schedule", "limit"), [("immediate", 3.05), ("stash", 3.05), ("two_pass", 6.05)])
def test_bytes_on_the_wire(ranks: GroupOf, schedule: str, limit: float, threshold: int, large: bool) -> None:
    for total, by_collective in ranks(2).run(traffic, schedule, threshold, large):
        print(f"{schedule}, threshold {threshold}, {'large' if large else 'small'} model: {total:.3f} P")
        assert 1.9 < total <= limit, by_collective
        if large:
            assert total > 0.95 * limit, "a large model communicates all of it"


def layered_traffic(accumulation: int) -> dict[str, float]:
    """Return the bytes of gathers and of reductions in a layered step of ``accumulation`` micro-batches, in P.

    DeepSpeed keeps no gathered parameter from forward to backward.
    """
    model = build_model()
    parameter_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0} | KEEPS_NOTHING
    params = {"accumulation": "layered"}
    engine = make_engine(
        model, "immediate", accumulation=accumulation, params=params, bf16={"enabled": True}, zero_optimization=zero
    )
    for _ in range(3):
        engine.train_batch([batch()] * accumulation)
    with WireBytes() as wire:
        engine.train_batch([batch()] * accumulation)
    gathered = sum(size for name, size in wire.counted.items() if "gather" in name)
    reduced = sum(size for name, size in wire.counted.items() if "scatter" in name)
    rest = sum(wire.counted.values()) - gathered - reduced
    return {
        kind: size / parameter_bytes for kind, size in (("gathered", gathered), ("reduced", reduced), ("rest", rest))
    }


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 4), (2, 16), (4, 1), (4, 4), (4, 16)])
def test_layered_accumulation_moves_3_p_whatever_the_step_holds(
    ranks: GroupOf, world_size: int, accumulation: int
) -> None:
    for counted in ranks(world_size).run(layered_traffic, accumulation):
        print(f"{world_size} ranks, {accumulation} micro-batches: {counted} P")
        assert counted["gathered"] == pytest.approx(2, abs=0.01)
        assert counted["reduced"] == pytest.approx(1, abs=0.01)
        assert counted["rest"] < 0.01


def after_gloo(count: Callable[[], int], at_most: int = 0) -> int:
    """Wait until ``count`` is at most ``at_most``, for up to ten seconds, and return it.

    gloo's own thread frees the input of a collective shortly after its end; lomo_ds frees it at once.
    """
    deadline = time.monotonic() + 10.0
    while count() > at_most and time.monotonic() < deadline:
        time.sleep(0.001)
    return count()


def gradients_alive(schedule: str, optimizer_type: str, micro_batches: int = 1) -> tuple[int, list[int]]:
    """Return the peak bytes of full gradients alive at once in three steps, and the sizes of the parameters."""
    model = build_model(layers=12, width=2)
    assert max(parameter.numel() for parameter in model.parameters()) == MIN_BUCKET_NUMEL
    alive: list[tuple[StorageWeakRef, int]] = []
    peak = 0

    def watch(parameter: torch.nn.Parameter) -> None:
        nonlocal peak
        assert parameter.grad is not None
        alive.append((StorageWeakRef(parameter.grad.untyped_storage()), parameter.grad.nbytes))
        peak = max(peak, after_gloo(bytes_alive, at_most=sum(sizes[-2:])) if micro_batches == 1 else bytes_alive())

    def bytes_alive() -> int:
        return sum(size for storage, size in alive if not storage.expired())

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)  # before the engine's own, which frees
    sizes = sorted(4 * parameter.numel() for parameter in model.parameters())
    engine = make_engine(model, schedule, 0, micro_batches, lr=0.01, optimizer_type=optimizer_type)
    for _ in range(3):
        engine.train_batch([batch()] * micro_batches)
    outside_layers = 3  # embedding, final norm and head
    assert len(alive) >= 3 * engine.schedule.passes * (micro_batches * (len(sizes) - outside_layers) + outside_layers)
    return peak, sizes


@pytest.mark.parametrize(
    ("schedule", "optimizer_type"),
    [("immediate", "LOMO"), ("two_pass", "LOMO"), ("stash", "LOMO"), ("immediate", "AdaLomo"), ("two_pass", "AdaLomo")],
)
def test_full_gradients_alive(ranks: GroupOf, schedule: str, optimizer_type: str) -> None:
    for peak, sizes in ranks(2).run(gradients_alive, schedule, optimizer_type):
        print(f"{optimizer_type}, {schedule}: {peak} bytes of gradients alive; the largest parameter's are {sizes[-1]}")
        assert 0 < peak <= sum(sizes[-2:]) < sum(sizes) / 4


@pytest.mark.parametrize("schedule", ["immediate", "stash"])
def test_gradients_of_one_layer_are_alive_with_layered_accumulation(ranks: GroupOf, schedule: str) -> None:
    """The sums of a layer's gradients, those of the micro-batch that is added, and what is still being reduced."""
    layer = 4 * sum(parameter.numel() for parameter in build_model(layers=1, width=2).model.layers[0].parameters())
    for peak, sizes in ranks(2).run(gradients_alive, schedule, "LOMO", 4):
        print(f"{schedule}: {peak} bytes of gradients alive; a layer's are {layer}")
        assert layer <= peak <= layer + sizes[-1] < sum(sizes) / 6


class AliveStorages(TorchDispatchMode):
    """Tracks every storage that is created while it is active and is as large as a matrix of the model."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.sizes = {parameter.nbytes for parameter in parameters if parameter.dim() == 2}
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() in self.sizes:
                self.made[leaf.untyped_storage()._cdata] = StorageWeakRef(leaf.untyped_storage())
        return result

    def count(self, excluded: list[torch.Tensor]) -> int:
        """Return how many tracked storages are alive, without those of the parameters and of ``excluded``."""
        known = self.parameters | {tensor.untyped_storage()._cdata for tensor in excluded}
        made = [storage for key, storage in self.made.items() if key not in known]
        return after_gloo(lambda: sum(not storage.expired() for storage in made))


def left_by_backward(schedule: str) -> tuple[int, int]:
    """Return how many matrix-sized tensors a backward created, and how many of them are still alive.

    All parameters stay gathered and no activation of this batch has that size, so they are all gradients.
    """
    model = build_model()
    engine = make_engine(model, schedule)
    engine.train_batch(batch())
    loss = engine(**batch()).loss
    with AliveStorages(list(model.parameters())) as watched:
        engine.backward(loss)
    stash: Any = engine.schedule
    return len(watched.made), watched.count(list(stash.stashed.values()) if schedule == "stash" else [])


@pytest.mark.parametrize("schedule", ["immediate", "stash"])
def test_backward_leaves_nothing_as_large_as_a_gradient(ranks: GroupOf, schedule: str) -> None:
    for made, left in ranks(2).run(left_by_backward, schedule):
        print(f"{schedule}: {left} of {made} tensors as large as a gradient left by backward")
        assert made > 4 * 7
        assert left == 0


def stash_bytes() -> tuple[int, int]:
    """Return the bytes in the stash after backward, and the bytes of this rank's shards of all gradients."""
    engine = make_engine(build_model(), "stash", threshold=0)
    stash: Any = engine.schedule
    engine.backward(engine(**batch()).loss)
    stashed_bytes = {
        shard.untyped_storage()._cdata: shard.untyped_storage().nbytes() for shard in stash.stashed.values()
    }
    engine.step()
    assert not stash.stashed
    return sum(stashed_bytes.values()), 4 * sum(target.numel for target in stash.targets)


def test_a_stash_holds_only_the_shards_of_this_rank(ranks: GroupOf) -> None:
    for stashed_bytes, share in ranks(2).run(stash_bytes):
        assert stashed_bytes == share
