"""The SGD rule on one shard against torch.optim.SGD and against arithmetic in float64."""

import pytest
import torch

from lomo_ds import numerics
from lomo_ds.rules import Sgd


def test_equals_torch_sgd_bit_for_bit() -> None:
    weights, gradient = torch.randn(1000), torch.randn(1000)
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradient.clone()
    torch.optim.SGD([parameter], lr=0.37).step()
    Sgd().update([weights], [gradient], coefficient=1.0, lr=0.37, weight_decay=0.0)
    assert torch.equal(weights, parameter.detach())


@pytest.mark.parametrize("coefficient", [0.25, torch.tensor(0.25, dtype=torch.float64)], ids=["float", "tensor"])
def test_weight_decay_is_decoupled(coefficient: float | torch.Tensor) -> None:
    weights, gradient = torch.randn(1000), torch.randn(1000)
    exact = weights.double() * (1 - 0.1 * 0.5) - 0.1 * 0.25 * gradient.double()
    Sgd().update([weights], [gradient], coefficient, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding_of_fp32_arithmetic(dtype: torch.dtype) -> None:
    weights, gradient = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    exact = weights.float() - 0.1 * gradient.float()
    Sgd().update([weights], [gradient], coefficient=1.0, lr=0.1, weight_decay=0.0)
    assert torch.equal(weights, exact.to(dtype))


def test_stochastic_rounding_keeps_small_updates_alive() -> None:
    weights = torch.ones(10_000, dtype=torch.bfloat16)
    gradient = torch.full_like(weights, 1.0)
    nearest = weights.clone()
    rule = Sgd(torch.Generator().manual_seed(0))
    for _ in range(100):
        rule.update([weights], [gradient], coefficient=1.0, lr=1e-4, weight_decay=0.0)
        Sgd().update([nearest], [gradient], coefficient=1.0, lr=1e-4, weight_decay=0.0)
    assert nearest.float().mean() == 1.0
    assert float(weights.float().mean()) == pytest.approx(0.99, abs=1e-3)


def test_a_shard_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "CHUNK_NUMEL", 16)
    weights = torch.zeros(50)
    Sgd().update([weights], [torch.ones(50)], coefficient=2.0, lr=0.5, weight_decay=0.0)
    assert torch.equal(weights, torch.full((50,), -1.0))


def test_an_empty_shard() -> None:
    Sgd().update([torch.zeros(0)], [torch.zeros(0)], coefficient=1.0, lr=0.1, weight_decay=0.1)
