"""Application of updates to float weights with PyTorch operations, for shards and directions on one device."""

import torch
from torch import Tensor

from lomo_ds.numerics.rounding import stochastic_round


def update_single(
    shards: list[Tensor],
    directions: list[Tensor],
    factor: float | Tensor,
    decay: float | Tensor = 1.0,
    scale: float | Tensor = 1.0,
) -> None:
    """Write ``decay * shard - factor * scale * direction`` into fp32 shards, as ``torch.optim.SGD`` computes it.

    Args:
        directions: fp32 directions are overwritten; others are copied to fp32.
        factor, decay, scale: floats, or 0-dim fp32 tensors on the shards' device.
    """
    exact = [direction.float() for direction in directions]
    if isinstance(decay, Tensor) or decay != 1:
        torch._foreach_mul_(shards, decay)
    alpha = 1.0
    for scalar in (scale, factor):
        if isinstance(scalar, Tensor):
            torch._foreach_mul_(exact, scalar)
        else:
            alpha *= scalar
    torch._foreach_add_(shards, exact, alpha=-alpha)


def update_half(
    shards: list[Tensor],
    directions: list[Tensor],
    factor: float | Tensor,
    decay: float | Tensor,
    generator: torch.Generator | None,
) -> None:
    """Write ``decay * shard - factor * direction`` into half-precision shards, rounded once from fp32.

    Products and differences are rounded to fp32 separately. Each temporary has as many elements as all shards
    together.

    Args:
        directions: a single fp32 direction is overwritten.
        factor, decay: floats, or 0-dim fp32 tensors on the shards' device.
        generator: random generator for stochastic rounding, on the shards' device; None rounds to nearest.
    """
    exact = _concatenate(shards).float()
    if isinstance(decay, Tensor) or decay != 1:
        exact.mul_(decay)
    exact.sub_(_concatenate(directions).float().mul_(factor))
    if generator is not None:
        exact = stochastic_round(exact, shards[0].dtype, generator)
    torch._foreach_copy_(shards, exact.split([shard.numel() for shard in shards]))


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
