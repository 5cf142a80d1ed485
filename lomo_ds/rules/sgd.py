"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lomo_ds.numerics import pieces
from lomo_ds.rules.sgd_eager import update_half, update_single

logger = logging.getLogger(__name__)

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
            for few, of_few in pieces(some, theirs) if needs_copies else [(some, theirs)]:
                compute(few, of_few)

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
        kernel = kernel_for(gradient.device)
        if kernel is not None:
            return partial(self._launch, kernel, factor, decay), False
        return partial(update_half, factor=factor, decay=decay, generator=self.generator), True

    def _launch(
        self,
        kernel: ModuleType,
        factor: float | Tensor,
        decay: float,
        shards: list[Tensor],
        gradients: list[Tensor],
    ) -> None:
        for shard, gradient in zip(shards, gradients, strict=True):
            kernel.update(shard, gradient, factor, decay, self._next_call())

    def _next_call(self) -> tuple[int, int] | None:
        """Seed and number of a kernel's call. The generator counts them, so its state says where noise goes on."""
        if self.generator is None:
            return None
        offset = self.generator.get_offset()
        self.generator.set_offset(offset + 4)  # CUDA takes multiples of four only
        return self.generator.initial_seed(), offset // 4


def _alike(shards: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Shards and gradients, apart by dtypes."""
    groups: dict[tuple[torch.dtype, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for shard, gradient in zip(shards, gradients, strict=True):
        key = (shard.dtype, gradient.dtype)
        group = groups.setdefault(key, ([], []))
        group[0].append(shard)
        group[1].append(gradient)
    return groups.values()


@functools.cache
def kernel_for(device: torch.device) -> ModuleType | None:
    """``sgd_kernel``, tried once; None off the GPU, and, with a warning, where Triton is missing or does not work."""
    if device.type != "cuda":
        return None
    try:
        from lomo_ds.rules import sgd_kernel

        trial = torch.zeros(1, dtype=torch.bfloat16, device=device)
        sgd_kernel.update(trial, trial.clone(), 1.0, 1.0, (0, 0))
    except Exception as error:  # no Triton, no C compiler, a GPU it does not know: each has an exception of its own
        logger.warning("half-precision weights are updated in several passes over memory, for Triton fails: %s", error)
        return None
    return sgd_kernel
