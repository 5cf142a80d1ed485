"""Contract of the update rules, for every rule: slices, zero gradients, bytes of state, sums and gradients alive."""

import math
from collections.abc import Callable
from types import GeneratorType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_ds.errors import ConfigError
from lomo_ds.numerics.apply import Update, apply
from lomo_ds.update import buckets
from lomo_ds.update.gradient_parts import parts_of
from lomo_ds.update.rule_states import RuleStates, state_bytes
from lomo_ds.update.rules import RULES, Gradient, Rule
from lomo_ds.update.target import Target
from tests.engines import make_engine
from tests.ranks import Ranks
from tests.reference import tiny_model
from tests.update.rule_references import (
    CASES,
    EIGHT_BIT_STATE,
    TRAININGS,
    WEIGHT_DECAY,
    example_rules,
    rule_engine,
    rule_of,
)
from tests.update.test_bytes import WireBytes, after_gloo, batch, build_model
from tests.updates import updater_of

GroupOf = Callable[..., Ranks]
SHAPES = [(5, 7), (61, 20), (64,), (1,), (2, 1), (3, 4, 6)]


def test_every_rule_has_a_reference() -> None:
    assert RULES.keys() <= CASES.keys()


def targets_of(shape: tuple[int, ...], world_size: int, lr: float, weight_decay: float = WEIGHT_DECAY) -> list[Target]:
    """Return the target of each rank; trailing ones may be empty."""
    numel = math.prod(shape)
    padded = -(-numel // world_size)
    return [
        Target(
            "weight",
            torch.Size(shape),
            min(rank * padded, numel),
            min((rank + 1) * padded, numel),
            0,
            {"lr": lr, "weight_decay": weight_decay},
        )
        for rank in range(world_size)
    ]


def random_tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Slices:
    """A parameter whose slices are updated in turn, as if each had a rank of its own.

    Attributes:
        most_sums: the most sums over the ranks that an update has asked for.
    """

    def __init__(self, rule: Rule, weight: Tensor, world_size: int, lr: float) -> None:
        self.rule, self.weight, self.world_size = rule, weight, world_size
        self.targets = targets_of(tuple(weight.shape), world_size, lr)
        self.states = [
            RuleStates([target], {target.name: rule}, world_size, torch.device("cpu")) for target in self.targets
        ]
        self.most_sums = 0

    def step(self, number: int, gradient: Tensor) -> None:
        flat = self.weight.view(-1)
        outcomes = []
        for rank, target in enumerate(self.targets):
            state = self.states[rank].values[target.name]
            projected = self.rule.project(target, gradient, state, number)
            summed = gradient if projected is None else projected
            start, stop = parts_of(target, summed.numel(), self.world_size).bounds[rank]
            part = Gradient(summed.flatten()[start:stop].clone())
            weight = flat[target.start : target.stop]
            outcomes.append(self.rule.update(target, weight, part, state, number))
        updates: Any = self._sum_over_ranks(outcomes) if isinstance(outcomes[0], GeneratorType) else outcomes
        slices = [flat[target.start : target.stop] for target in self.targets]
        apply(list(zip(slices, updates, strict=True)), None)

    def _sum_over_ranks(self, generators: list[Any]) -> list[Update]:
        partials = [next(generator) for generator in generators]
        for sums in range(1, 100):
            self.most_sums = max(self.most_sums, sums)
            assert {(partial.dim(), partial.dtype) for partial in partials} == {(1, torch.float32)}
            assert len({partial.numel() for partial in partials}) == 1, "an all-reduce has one size on all ranks"
            total = torch.stack(partials).sum(0)
            partials, updates = [], []
            for generator in generators:
                try:
                    partials.append(generator.send(total.clone()))
                except StopIteration as end:
                    updates.append(end.value)
            if updates:
                assert not partials, "all ranks ask for equally many sums"
                return updates
        raise AssertionError("the rule asks for sums without end")


@pytest.mark.parametrize("name", CASES)
def test_slices_are_updated_as_the_whole_parameter(name: str) -> None:
    rule, most_sums = rule_of(name), 0
    for seed, shape in enumerate(SHAPES):
        for world_size in (1,) if name in EIGHT_BIT_STATE else (1, 3, 8):
            parameter = torch.nn.Parameter(random_tensor(shape, seed))
            slices = Slices(rule, parameter.detach().clone(), world_size, CASES[name].lr)
            reference = CASES[name].reference([parameter], CASES[name].lr, WEIGHT_DECAY)
            for step in range(3):
                gradient = random_tensor(shape, 100 + step)
                slices.step(step + 1, gradient)
                parameter.grad = gradient.clone()
                reference.step()
            largest = float((slices.weight - parameter.detach()).abs().max())
            assert largest < 1e-6, (shape, world_size)
            most_sums = max(most_sums, slices.most_sums)
    assert most_sums == rule.sums_over_ranks


class OneWeight:
    """Store of a single tensor."""

    in_place = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def announce(self, names: list[str]) -> None: ...

    def lend(self, name: str) -> Tensor:
        return self.weight.view(-1)

    def commit(self, name: str) -> None: ...

    def flush(self) -> None: ...


def update_with_zeros(name: str, shape: tuple[int, ...], weight_decay: float) -> tuple[Tensor, Tensor, RuleStates]:
    """Return a weight before and after two updates whose gradients are zero, and the state."""
    (target,) = targets_of(shape, 1, CASES[name].lr, weight_decay)
    before = random_tensor(shape, seed=0)
    updater = updater_of([target], OneWeight(after := before.clone()), rule_of(name))
    for step in (1, 2):
        updater.step = step
        updater.start()
        updater.update([target], [updater.project(target, torch.zeros(shape)).reshape(-1)], [1.0], None)
        updater.flush()
    return before, after, updater.states


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_gradient_changes_nothing_but_decay(name: str, shape: tuple[int, ...]) -> None:
    before, after, _ = update_with_zeros(name, shape, weight_decay=0.0)
    assert torch.equal(before, after)
    before, after, _ = update_with_zeros(name, shape, weight_decay=WEIGHT_DECAY)
    parameter = torch.nn.Parameter(before.clone())
    reference = CASES[name].reference([parameter], CASES[name].lr, WEIGHT_DECAY)
    for _ in range(2):
        parameter.grad = torch.zeros(shape)
        reference.step()
    torch.testing.assert_close(after, parameter.detach(), rtol=1e-6, atol=0)
    shrunk = after / before
    torch.testing.assert_close(shrunk, shrunk.mean().expand(shape), rtol=1e-6, atol=0)
    assert 0.9 < float(shrunk.mean()) < 1


def counted_bytes(target: Target, rule: Rule, world_size: int) -> int:
    """Count the bytes that the specs of a rule's state stand for on this rank, independently of how they are kept."""
    total = 0
    for spec in rule.state(target).values():
        if not spec.sharded:
            total += spec.shape.numel() * spec.dtype.itemsize
        elif spec.dtype == torch.int8:  # scales and codes, each in whole units of 16 bytes
            codes = -(-target.full_numel // world_size)
            total += 16 * -(-2 * -(-codes // 64) // 16) + 16 * -(-codes // 16)
        else:
            total += target.numel * spec.dtype.itemsize
    return total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_state_takes_the_declared_bytes(name: str, world_size: int) -> None:
    rule = rule_of(name)
    for shape in SHAPES:
        for target in targets_of(shape, world_size, lr=0.1):
            states = RuleStates([target], {target.name: rule}, world_size, torch.device("cpu"))
            allocated = {
                storage.untyped_storage().data_ptr(): storage.untyped_storage().nbytes()
                for storage in states.storage[target.name].values()
                if storage.untyped_storage().nbytes()
            }
            declared = state_bytes(target, states.specs[target.name], world_size)
            assert sum(allocated.values()) == declared == counted_bytes(target, rule, world_size)


def test_blocks_of_zeros_have_a_scale_to_divide_by() -> None:
    (name,) = EIGHT_BIT_STATE
    _, _, states = update_with_zeros(name, (61, 20), weight_decay=0.0)
    (momentum,) = states.values["weight"].values()
    assert not isinstance(momentum, Tensor)
    assert bool((momentum.scales > 0).all())
    assert not momentum.codes.any()


# collectives and memory of a step on two ranks


@example_rules()
def sums_and_shards(name: str) -> tuple[int, int, int]:
    """Return a step's small sums over ranks, its buckets, and the most buckets of gradient shards that wait."""
    with mock.patch.object(buckets, "MIN_BUCKET_NUMEL", 2**12):
        engine = rule_engine(name, build_model(layers=2), "immediate", threshold=0)
    updater: Any = engine.schedule.updater
    update, waiting, most = updater.update, [], 0

    def watched(targets: Any, gradients: list[Tensor], *arguments: Any) -> None:
        nonlocal most
        waiting.append(StorageWeakRef(gradients[0].untyped_storage()))
        update(targets, gradients, *arguments)
        gradients.clear()
        alive = after_gloo(lambda: sum(not shard.expired() for shard in waiting), at_most=2)
        most = max(most, alive)

    engine.train_batch(batch())
    updater.update = watched
    with WireBytes() as wire:
        engine.train_batch(batch())
    assert not after_gloo(lambda: sum(not shard.expired() for shard in waiting)), "nothing waits after a step"
    return wire.calls["allreduce_"], wire.calls["_reduce_scatter_base_"], most


@pytest.mark.parametrize("name", TRAININGS)
def test_a_bucket_costs_few_small_sums(ranks: GroupOf, name: str) -> None:
    sums = max(rule_of(rule).sums_over_ranks for rule in name.split("+"))
    for small_sums, bucket_count, waiting in ranks(2).run(sums_and_shards, name):
        print(f"{name}: {small_sums} small sums for {bucket_count} buckets, of which up to {waiting} wait")
        assert name == "projected" or bucket_count > 8
        of_buckets = small_sums - 2  # without that of token counts, and that of norm and loss
        assert of_buckets <= 2 * bucket_count
        assert of_buckets == 0 if sums == 0 else 0 < of_buckets < bucket_count + sums
        assert waiting <= max(sums, 1), "the latest bucket, or one for each sum"


def traffic_of_large_matrices(name: str) -> tuple[float, dict[str, int]]:
    """Return the bytes of a step in units of all parameters' bytes, with matrices of a thousand rows and columns."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    parameter_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    zero = {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
    }  # fmt: skip
    engine = make_engine(
        model, "immediate", optimizer_type=name, lr=1e-3, bf16={"enabled": True}, zero_optimization=zero
    )
    ids = torch.arange(4)[None]
    for _ in range(2):
        engine.train_batch({"input_ids": ids, "labels": ids})
    with WireBytes() as wire:
        engine.train_batch({"input_ids": ids, "labels": ids})
    return sum(wire.counted.values()) / parameter_bytes, dict(wire.counted)


@pytest.mark.parametrize("name", [name for name in RULES if rule_of(name).sums_over_ranks])
def test_sums_hardly_add_to_the_traffic(ranks: GroupOf, name: str) -> None:
    for total, by_collective in ranks(2).run(traffic_of_large_matrices, name):
        print(f"{name}: {total:.4f} P")
        assert 2.9 < total <= 3.01, by_collective


# rules of param groups


def refused_type(group: dict[str, Any]) -> str:
    model = tiny_model()
    with pytest.raises(ConfigError) as error:
        make_engine(model, model_parameters=[{"params": list(model.parameters()), **group}])
    return str(error.value)


def test_a_param_group_of_an_unknown_type_is_refused(ranks: GroupOf) -> None:
    message = ranks(1).run(refused_type, {"type": "Adam"})[0]
    assert "the type of a param group must be one of lomo, adalomo, got 'adam' for gain" in message
    assert "did you mean 'type'" in ranks(1).run(refused_type, {"typ": "adalomo"})[0]
