"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lomo_ds.numerics import chunks, stochastic_round


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
        for shard, gradient in zip(shards, gradients, strict=True):
            for weights, of_weights in chunks(shard, gradient):
                exact = weights.to(of_weights.device, torch.float32)  # fp32 shards are updated where they lie
                if weight_decay:
                    exact.mul_(1 - lr * weight_decay)
                exact.sub_(of_weights.float() * coefficient, alpha=lr)
                self._store(weights, exact)

    def state(self) -> dict[str, Tensor]:
        """See ``Rule.state``."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See ``Rule.load_state``."""
        if self.generator is not None and "generator" in state:  # there is none of a run that rounded to nearest
            self.generator.set_state(state["generator"])

    def _store(self, weights: Tensor, exact: Tensor) -> None:
        if exact.data_ptr() == weights.data_ptr():
            return
        if weights.dtype == torch.float32 or self.generator is None:
            weights.copy_(exact)
        else:
            weights.copy_(stochastic_round(exact, weights.dtype, self.generator))
