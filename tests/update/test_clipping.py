"""Clipping: coefficients equal those of torch.nn.utils, and parameters are grouped by layer."""

import pytest
import torch

from lomo_ds.update.clipping import Clipping, clipping_groups


@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0])
def test_global_norm_equals_torch(limit: float) -> None:
    gradients = [torch.randn(7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    squared = torch.stack([gradient.double().square().sum() for gradient in gradients])
    coefficients = Clipping(global_norm=limit).coefficients(squared)
    parameters = [torch.nn.Parameter(torch.zeros(7)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for parameter, gradient, coefficient in zip(parameters, gradients, coefficients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient * coefficient.float(), parameter.grad)


def test_group_norm_scales_each_group_alone() -> None:
    coefficients = Clipping(group_norm=1.0).coefficients(torch.tensor([4.0, 0.25, 0.0], dtype=torch.float64))
    assert coefficients.tolist() == pytest.approx([0.5, 1.0, 1.0], abs=1e-5)


def test_value_limits_the_true_gradient() -> None:
    assert Clipping(value=1.5).limit(scale=8.0) == 12.0


def test_no_clip_changes_nothing() -> None:
    assert Clipping().limit(scale=8.0) is None
    assert Clipping().coefficients(torch.tensor([1e18])).tolist() == [1.0]


def test_a_group_is_a_layer_or_a_module_outside_the_layers() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.3.weight",
        "model.layers.10.input_layernorm.weight",
        "model.norm.weight",
        "0.weight",
        "0.bias",
        "1.weight",
        "scale",
    ]
    assert clipping_groups(names) == [0, 1, 1, 2, 3, 4, 4, 5, 6]
