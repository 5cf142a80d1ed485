"""Training on a GPU: steps equal those of plain PyTorch on the CPU, with and without offload."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.models import recompute_activations
from tests.checkpoint.test_engine_checkpoints import check_bit_exact_resume
from tests.determinism import deterministic_algorithms
from tests.engine.test_baseline import PlainOptimizer, make_baseline, trainable_model
from tests.engines import largest_difference, make_engine, weights_of
from tests.host_memory import same_from_host_memory
from tests.layered_models import layered_model, micro_batches, padded
from tests.ranks import Ranks
from tests.reference import PlainSGD, part, tiny_model, whole_batch

pytestmark = pytest.mark.cuda
GroupOf = Callable[..., Ranks]


def train_on_gpu(schedule: str, params: dict[str, Any], zero: dict[str, Any], accumulation: int) -> float:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model()
    reference = PlainSGD(copy.deepcopy(model), lr=0.3, global_norm=0.1 if schedule != "immediate" else None)
    engine = make_engine(
        model,
        schedule,
        accumulation=accumulation,
        global_norm=reference.global_norm,
        params=params,
        zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 25} | zero,
    )
    for step in range(5):
        batch = whole_batch(step, rows=2 * accumulation)
        loss, norm = reference.step(batch)
        micro_batches = [{k: v.chunk(accumulation)[i] for k, v in batch.items()} for i in range(accumulation)]
        assert float(engine.train_batch(micro_batches)) == pytest.approx(loss, abs=1e-4)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-3)
    return largest_difference({name: weight.cpu() for name, weight in weights_of(engine).items()}, reference.model)


@pytest.mark.parametrize(
    ("schedule", "params", "accumulation"),
    [
        ("immediate", {}, 1),
        ("two_pass", {}, 1),
        ("stash", {"stash_device": "gpu"}, 1),
        ("stash", {"stash_device": "cpu"}, 1),
        ("stash", {"stash_device": "cpu"}, 4),
    ],
)
@pytest.mark.parametrize("zero", [{}, {"offload_param": {"device": "cpu", "pin_memory": True}}], ids=["gpu", "offload"])
def test_equals_plain_sgd(
    ranks: GroupOf, schedule: str, params: dict[str, Any], accumulation: int, zero: dict[str, Any]
) -> None:
    assert max(ranks(1, "cuda").run(train_on_gpu, schedule, params, zero, accumulation)) < 1e-5


def train_layered_on_gpu(schedule: str, zero: dict[str, Any], activation_offload: bool) -> float:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = layered_model()
    reference = PlainSGD(copy.deepcopy(model), lr=0.3, global_norm=0.1 if schedule != "immediate" else None)
    recompute_activations(model, activation_offload)
    engine = make_engine(
        model,
        schedule,
        accumulation=4,
        global_norm=reference.global_norm,
        params={"accumulation": "layered"},
        zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 25} | zero,
    )
    for step in range(5):
        batches = micro_batches(step, 4)
        loss, norm = reference.step(padded(batches))
        assert float(engine.train_batch(batches)) == pytest.approx(loss, abs=1e-4)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-3)
    return largest_difference({name: weight.cpu() for name, weight in weights_of(engine).items()}, reference.model)


@pytest.mark.parametrize("schedule", ["immediate", "two_pass", "stash"])
@pytest.mark.parametrize("zero", [{}, {"offload_param": {"device": "cpu", "pin_memory": True}}], ids=["gpu", "offload"])
@pytest.mark.parametrize("activation_offload", [False, True])
def test_layered_accumulation_equals_plain_sgd(
    ranks: GroupOf, schedule: str, zero: dict[str, Any], activation_offload: bool
) -> None:
    assert max(ranks(1, "cuda").run(train_layered_on_gpu, schedule, zero, activation_offload)) < 1e-5


def compare_with_host_memory_on_gpu(schedule: str) -> None:
    with deterministic_algorithms():
        same_from_host_memory(1024, 12, schedule)


@pytest.mark.parametrize("schedule", ["immediate", "two_pass", "stash"])
def test_offload_to_host_memory_is_bit_equal(ranks: GroupOf, schedule: str) -> None:
    ranks(1, "cuda").run(compare_with_host_memory_on_gpu, schedule)


def train_baseline_on_gpu(optim: str, zero: dict[str, Any]) -> float:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = trainable_model()
    reference = PlainOptimizer(copy.deepcopy(model), optim)
    engine = make_baseline(model, optim, accumulation=2, zero=zero)
    for step in range(3):
        batch = whole_batch(step, rows=4)
        loss, norm = reference.step(batch)
        assert float(engine.train_batch([part(batch, index, 2) for index in range(2)])) == pytest.approx(loss, abs=1e-4)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-3)
    return largest_difference({name: weight.cpu() for name, weight in weights_of(engine).items()}, reference.model)


@pytest.mark.parametrize("zero", [{}, {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_the_baselines_equal_torch_optim(ranks: GroupOf, optim: str, zero: dict[str, Any]) -> None:
    assert max(ranks(1, "cuda").run(train_baseline_on_gpu, optim, zero)) < 1e-5


def train_half(section: str) -> list[float]:
    sections: dict[str, Any] = {section: {"enabled": True}}
    engine = make_engine(tiny_model(), "stash", global_norm=1.0, **sections)
    return [float(engine.train_batch(whole_batch(0, rows=4))) for _ in range(20)]


@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_half_precision_learns(ranks: GroupOf, section: str) -> None:
    losses = ranks(1, "cuda").run(train_half, section)[0]
    assert losses[-1] < 0.8 * losses[0]


def interrupted_on_gpu(folder: str, precision: str, offload: bool, in_background: bool) -> None:
    with deterministic_algorithms():
        check_bit_exact_resume(folder, precision, offload, in_background)


@pytest.mark.parametrize(
    ("precision", "offload", "in_background"), [("bf16", False, True), ("fp16", False, False), ("bf16", True, True)]
)
def test_resuming_is_bit_exact(
    ranks: GroupOf, tmp_path: Path, precision: str, offload: bool, in_background: bool
) -> None:
    ranks(1, "cuda").run(interrupted_on_gpu, str(tmp_path), precision, offload, in_background)
