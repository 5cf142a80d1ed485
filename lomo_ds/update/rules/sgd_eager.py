"""SGD update with PyTorch operations, for shards and gradients on one device."""

import torch
from torch import Tensor

from lomo_ds.numerics.rounding import stochastic_round


def update_single(
    shards: list[Tensor], gradients: list[Tensor], coefficient: float | Tensor, lr: float, decay: float
) -> None:
    """Write ``decay * shard - lr * coefficient * gradient`` into fp32 shards, as ``torch.optim.SGD`` computes it.

    Args:
        gradients: fp32 gradients are overwritten; others are copied to fp32.
        coefficient: a float, or a 0-dim fp32 tensor on the shards' device.
    """
    exact = [gradient.float() for gradient in gradients]
    if decay != 1:
        torch._foreach_mul_(shards, decay)
    if isinstance(coefficient, Tensor):
        torch._foreach_mul_(exact, coefficient)
        torch._foreach_add_(shards, exact, alpha=-lr)
    else:
        torch._foreach_add_(shards, exact, alpha=-lr * coefficient)


def update_half(
    shards: list[Tensor],
    gradients: list[Tensor],
    factor: float | Tensor,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """Write ``decay * shard - factor * gradient`` into half-precision shards, rounded once from fp32.

    Products and differences are rounded to fp32 separately. Each temporary has as many elements as all shards
    together.

    Args:
        gradients: a single fp32 gradient is overwritten.
        factor: a float, or a 0-dim fp32 tensor on the shards' device.
        generator: random generator for stochastic rounding, on the shards' device; None rounds to nearest.
    """
    exact = _concatenate(shards).float()
    if decay != 1:
        exact.mul_(decay)
    exact.sub_(_concatenate(gradients).float().mul_(factor))
    if generator is not None:
        exact = stochastic_round(exact, shards[0].dtype, generator)
    torch._foreach_copy_(shards, exact.split([shard.numel() for shard in shards]))


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
