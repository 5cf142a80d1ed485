"""Gradient clipping: by value, by the norm of each group of parameters, or by the global norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.zero3.gathering import layer_of

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Clipping:
    """Clipping settings: at most one of the three limits is set; with none, gradients are not clipped.

    Attributes:
        value: every element is clamped to [-value, value].
        group_norm: each group of parameters (a decoder layer) is scaled down to this norm
            (arXiv 2306.09782, section 3.3).
        global_norm: all gradients are scaled down together to this norm.
    """

    value: float | None = None
    group_norm: float | None = None
    global_norm: float | None = None

    def __str__(self) -> str:
        if self.global_norm is not None:
            return f"the global gradient norm to {self.global_norm:g} (gradient_clipping)"
        if self.group_norm is not None:
            return f"each layer's gradient norm to {self.group_norm:g} (clip_group_norm)"
        return "none" if self.value is None else f"each gradient element to {self.value:g} (clip_grad_value)"

    def limit(self, scale: float) -> float | None:
        """Return the largest allowed magnitude of gradient elements that are ``scale`` times their true values."""
        return None if self.value is None else self.value * scale

    def coefficients(self, squared_norms: Tensor) -> Tensor:
        """Return the clip coefficient of each group, given the squared norms of all groups (1-D, unscaled)."""
        if self.global_norm is not None:
            norm = squared_norms.sum().sqrt()
            return (self.global_norm / (norm + _EPSILON)).clamp(max=1.0).expand_as(squared_norms)
        if self.group_norm is not None:
            return (self.group_norm / (squared_norms.sqrt() + _EPSILON)).clamp(max=1.0)
        return torch.ones_like(squared_norms)


def clipping_groups(names: list[str]) -> list[int]:
    """Return each parameter's clipping group: one group per decoder layer, and one per module outside the layers."""
    owners = [layer_of(name) or name.rpartition(".")[0] for name in names]
    group_of_owner = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    return [group_of_owner[owner] for owner in owners]
