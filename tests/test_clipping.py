"""Clip factors against torch.nn.utils, and which parameters clip together."""

import pytest
import torch

from lomo_ds.clipping import Clipping, clipping_groups


@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0])
def test_global_norm_is_torchs(limit: float) -> None:
    gradients = [torch.randn(7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    squared = torch.stack([gradient.double().square().sum() for gradient in gradients])
    factors = Clipping(global_norm=limit).coefficients(squared)
    parameters = [torch.nn.Parameter(torch.zeros(7)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for parameter, gradient, factor in zip(parameters, gradients, factors, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient * factor.float(), parameter.grad)


def test_group_norm_scales_each_group_alone() -> None:
    factors = Clipping(group_norm=1.0).coefficients(torch.tensor([4.0, 0.25, 0.0], dtype=torch.float64))
    assert factors.tolist() == pytest.approx([0.5, 1.0, 1.0], abs=1e-5)


def test_value_limits_the_true_gradient() -> None:
    scaled = torch.tensor([-80.0, 4.0, 16.0])  # of a true gradient of -10, 0.5, 2
    Clipping(value=1.0).clamp_(scaled, scale=8.0)
    assert scaled.tolist() == [-8.0, 4.0, 8.0]


def test_a_limit_beyond_fp16_limits_nothing() -> None:
    scaled = torch.tensor([-60000.0, 4.0], dtype=torch.float16)
    Clipping(value=10.0).clamp_(scaled, scale=2.0**16)
    assert scaled.tolist() == [-60000.0, 4.0]


def test_no_clip_changes_nothing() -> None:
    gradient = torch.tensor([1e9, -1e9])
    Clipping().clamp_(gradient, scale=1.0)
    assert gradient.tolist() == [1e9, -1e9]
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
