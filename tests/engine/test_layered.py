"""Layered accumulation takes the steps of plain PyTorch on all rows, in every combination."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor

from lomo_ds.models import tile_logits
from tests.engines import largest_difference, make_engine, weights_of
from tests.layered_models import layered_model, micro_batches, padded
from tests.ranks import Ranks
from tests.reference import PlainSGD
from tests.update.rule_references import difference, example_rules, plain_training, rule_engine
from tests.update.test_equivalence import CLIPS
from tests.zero3.test_nvme import on_nvme

STEPS = 4
TOLERANCE = 1e-6
MICRO_BATCHES = 4
GroupOf = Callable[..., Ranks]
COMBINATIONS = [
    (schedule, clip)
    for schedule in ("immediate", "two_pass", "stash")
    for clip in CLIPS
    if (schedule, clip) != ("immediate", "global norm")
]


@dataclass(frozen=True)
class Options:
    """Settings that must not change the result."""

    tied: bool = False
    frozen: tuple[str, ...] = ()
    threshold: int = 0
    recomputed: bool = False
    tiled: bool = False
    offload: str = "none"
    folder: str = ""  # of parameters on NVMe


OPTIONS = [
    Options(),
    Options(tied=True, threshold=100_000, tiled=True),
    Options(frozen=("up_proj", "layers.1."), recomputed=True),
    Options(frozen=("embed_tokens", "layers.0.self_attn"), threshold=100),
]


def sections(options: Options) -> dict[str, Any]:
    """Return sections of a ds_config."""
    if options.offload == "nvme":
        return on_nvme(options.folder, options.threshold)
    offload = {"device": options.offload}
    zero = {"stage": 3, "stage3_param_persistence_threshold": options.threshold, "offload_param": offload}
    return {"zero_optimization": zero}


@example_rules()
def train_both(rule: str, schedule: str, clip: str, options: Options) -> float:
    """Train the same model with an engine and with plain PyTorch; return the largest weight difference."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = layered_model(options.tied, options.frozen)
    reference = plain_training(rule, copy.deepcopy(model).double(), **CLIPS[clip])
    if options.tiled:
        tile_logits(model, tile_bytes=1200)
    if options.recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    limits = CLIPS[clip]
    engine = rule_engine(
        rule,
        model,
        schedule,
        options.threshold,
        MICRO_BATCHES,
        global_norm=limits.get("global_norm"),
        params={
            "accumulation": "layered",
            "clip_grad_value": limits.get("value"),
            "clip_group_norm": limits.get("group_norm"),
        },
        **sections(options),
    )
    assert engine.schedule.__class__.__name__.lower() == schedule.replace("_", "")
    steps = STEPS
    for step in range(steps):
        batches = micro_batches(step, MICRO_BATCHES * world_size)
        loss, norm = reference.step(padded(batches))
        local = batches[rank * MICRO_BATCHES : (rank + 1) * MICRO_BATCHES]
        assert float(engine.train_batch(local)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    assert (engine.global_steps, engine.skipped_steps) == (steps, 0)
    largest = difference(rule, engine, reference)
    engine.destroy()
    return largest


def runs() -> Iterator[tuple[str, str, str, int, Options]]:
    """Yield rules, schedules, clips and world sizes, with options that are spread over them."""
    for index, (schedule, clip) in enumerate(COMBINATIONS):
        for world_size in (1, 2, 3 + index % 2):
            yield "lomo", schedule, clip, world_size, OPTIONS[(index + world_size) % len(OPTIONS)]
    for index, (schedule, clip) in enumerate(
        [("immediate", "no clip"), ("two_pass", "global norm"), ("stash", "global norm"), ("immediate", "group norm")]
    ):
        yield "adalomo", schedule, clip, 1 + index, OPTIONS[index]
        for offload in ("cpu", "nvme"):
            yield "lomo", schedule, clip, 1 + index % 2, replace(OPTIONS[-index], offload=offload)


@pytest.mark.parametrize(("rule", "schedule", "clip", "world_size", "options"), list(runs()))
def test_equals_plain_pytorch(
    ranks: GroupOf, tmp_path: Path, rule: str, schedule: str, clip: str, world_size: int, options: Options
) -> None:
    options = replace(options, folder=str(tmp_path))
    largest = max(ranks(world_size).run(train_both, rule, schedule, clip, options))
    print(f"{rule}, {schedule}, {clip}, {world_size} ranks, {asdict(options)}: {largest:.1e}")
    assert largest < TOLERANCE


def in_micro_batches(layer: torch.nn.Module) -> None:
    """Let a layer of plain PyTorch run each row by itself, in order; nothing is recomputed."""
    forward = layer.forward

    def run(hidden_states: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        rows = zip(hidden_states.split(1), attention_mask.expand(len(hidden_states), -1, -1, -1).split(1), strict=True)
        return torch.cat([forward(row, attention_mask=mask, **inputs) for row, mask in rows])

    layer.forward = run


def train_with_dropout(schedule: str) -> float:
    """Train on micro-batches of one row, each with masks of its own; return the largest weight difference."""
    model = layered_model(dropout=0.1, attn_implementation="eager")
    plain = copy.deepcopy(model).double()
    plain.config.use_cache = False
    for layer in plain.model.layers:
        in_micro_batches(layer)
    reference = PlainSGD(plain, lr=0.3)
    engine = make_engine(model, schedule, accumulation=3, params={"accumulation": "layered"})
    for step in range(STEPS):
        batches = micro_batches(step, 3, rows=1, lengths=(12,))
        batches[1]["labels"] = batches[1]["input_ids"].clone()
        torch.manual_seed(step)
        loss, _ = reference.step(padded(batches))
        after = torch.get_rng_state()
        torch.manual_seed(step)
        assert float(engine.train_batch(batches)) == pytest.approx(loss, abs=1e-5)
        assert torch.equal(torch.get_rng_state(), after), "backward leaves the generator as forward does"
    return largest_difference(weights_of(engine), plain)


@pytest.mark.parametrize("schedule", ["immediate", "two_pass", "stash"])
def test_dropout_draws_its_masks_once_for_each_micro_batch(ranks: GroupOf, schedule: str) -> None:
    assert max(ranks(1).run(train_with_dropout, schedule)) < TOLERANCE


def train_int8_weights(schedule: str) -> list[float]:
    """Compare each step with one of plain PyTorch from the same weights; return differences in units of a code."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = layered_model()
    plain = copy.deepcopy(model).double()
    reference = PlainSGD(plain, lr=0.3)
    params = {"accumulation": "layered", "weights": "int8", "rounding": "nearest"}
    engine = make_engine(model, schedule, 0, 3, params=params)
    differences = []
    for step in range(STEPS):
        batches = micro_batches(step, 3 * world_size)
        plain.load_state_dict(weights_of(engine))
        loss, norm = reference.step(padded(batches))
        assert float(engine.train_batch(batches[3 * rank : 3 * rank + 3])) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
        for name, weight in weights_of(engine).items():
            expected = plain.get_parameter(name).detach()
            code = float(expected.abs().max()) / 127 if weight.dim() == 2 else TOLERANCE
            differences.append(float((weight - expected).abs().max()) / code)
    return differences


@pytest.mark.parametrize(("schedule", "world_size"), [("immediate", 1), ("immediate", 2), ("stash", 2)])
def test_int8_weights(ranks: GroupOf, schedule: str, world_size: int) -> None:
    for differences in ranks(world_size).run(train_int8_weights, schedule):
        assert max(differences) <= 1.0


def train_on_unequal_numbers() -> float:
    """Train with one more micro-batch on each rank than on the rank before."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, "immediate", 0, 2, params={"accumulation": "layered"})
    for step in range(STEPS):
        batches = micro_batches(step, sum(range(1, world_size + 1)))
        loss, _ = reference.step(padded(batches))
        first = sum(range(rank + 1))
        assert float(engine.train_batch(batches[first : first + rank + 1])) == pytest.approx(loss, abs=1e-5)
    return largest_difference(weights_of(engine), reference.model)


def test_ranks_may_have_different_numbers_of_micro_batches(ranks: GroupOf) -> None:
    assert max(ranks(3).run(train_on_unequal_numbers)) < TOLERANCE


def train_with_masks() -> float:
    """Train on micro-batches with an attention mask, whose rows are padded on the left."""
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, accumulation=3, params={"accumulation": "layered"})
    for step in range(STEPS):
        batches = micro_batches(step, 3, lengths=(12,))
        for number, batch in enumerate(batches):
            batch["attention_mask"] = (torch.arange(12) >= number).long().expand(2, -1)
            batch["labels"][:, : number + 1] = -100
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        loss, _ = reference.step(whole)
        shortened = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        assert float(engine.train_batch(shortened)) == pytest.approx(loss, abs=1e-5)
    return largest_difference(weights_of(engine), reference.model)


def test_attention_masks(ranks: GroupOf) -> None:
    assert max(ranks(1).run(train_with_masks)) < TOLERANCE


def continue_after_an_exception() -> float:
    """Let the recomputation of a layer fail once, then take the same step; return the largest weight difference."""
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model).double(), lr=0.3)
    engine = make_engine(model, "stash", accumulation=3, params={"accumulation": "layered"})
    for step in range(STEPS):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        all_batches = micro_batches(step, 3 * world_size)
        reference.step(padded(all_batches))
        batches = all_batches[3 * rank : 3 * rank + 3]
        calls: list[int] = []

        def fail(module: torch.nn.Module, arguments: Any, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 5:  # the second micro-batch in backward, after three in forward
                raise ZeroDivisionError

        handle = engine.module.model.layers[0].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            engine.train_batch(batches)
        handle.remove()
        assert "forward" not in vars(engine.module.model.layers[0])
        engine.train_batch(batches)
    return largest_difference(weights_of(engine), reference.model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_after_an_exception(ranks: GroupOf, world_size: int) -> None:
    assert max(ranks(world_size).run(continue_after_an_exception)) < TOLERANCE
