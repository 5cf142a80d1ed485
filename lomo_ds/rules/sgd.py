"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomo_ds.numerics import pieces
from lomo_ds.rules.sgd_eager import update_half, update_single

Computation = Callable[[list[Tensor], list[Tensor]], None]  # writes shards from gradients on the same device


class Sgd:
    """Plain SGD with fp32 arithmetic and no state.

    Args:
        generator: source of stochastic rounding for half-precision shards, on the device that computes;
            None rounds to nearest.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def update(
        self,
        shards: Sequence[Tensor],
        gradients: Sequence[Tensor],
        coefficient: float | Tensor,
        lr: float,
        weight_decay: float,
    ) -> None:
        """See ``Rule.update``."""
        for some, theirs in _alike(shards, gradients):
            compute, needs_copies = self._computation(some[0], theirs[0], coefficient, lr, 1 - lr * weight_decay)
            kept_elsewhere = some[0].device != theirs[0].device
            if not (needs_copies or kept_elsewhere):
                compute(some, theirs)
                continue
            for few, of_few in pieces(some, theirs):
                here = [shard.to(of_few[0].device, non_blocking=True) for shard in few]  # or the shards themselves
                compute(here, of_few)
                if kept_elsewhere:
                    torch._foreach_copy_(few, here, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """See ``Rule.state``."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See ``Rule.load_state``."""
        if self.generator is not None and "generator" in state:  # there is none of a run that rounded to nearest
            self.generator.set_state(state["generator"])

    def _computation(
        self, shard: Tensor, gradient: Tensor, coefficient: float | Tensor, lr: float, decay: float
    ) -> tuple[Computation, bool]:
        """How shards and gradients like these become new shards, and whether it copies them on the way."""
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(gradient.device, torch.float64, non_blocking=True)
        if shard.dtype == torch.float32:
            single = coefficient.float() if isinstance(coefficient, Tensor) else coefficient
            copies = gradient.dtype != torch.float32
            return partial(update_single, coefficient=single, lr=lr, decay=decay), copies
        factor = (coefficient * lr).float() if isinstance(coefficient, Tensor) else coefficient * lr
        return partial(update_half, factor=factor, decay=decay, generator=self.generator), True


def _alike(shards: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Shards and gradients, apart by dtypes and devices."""
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for shard, gradient in zip(shards, gradients, strict=True):
        key = (shard.dtype, shard.device, gradient.dtype, gradient.device)
        group = groups.setdefault(key, ([], []))
        group[0].append(shard)
        group[1].append(gradient)
    return groups.values()
