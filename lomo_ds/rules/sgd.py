"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lomo_ds import int8
from lomo_ds.numerics import pieces
from lomo_ds.rules.base import Values
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
        self.calls: dict[int, int] = defaultdict(int)  # updates so far of each tensor in eight bits, by its number

    def update(
        self,
        shards: Sequence[Values],
        gradients: Sequence[Tensor],
        coefficient: float | Tensor,
        lr: float,
        weight_decay: float,
    ) -> None:
        """See ``Rule.update``."""
        floats = [(s, g) for s, g in zip(shards, gradients, strict=True) if isinstance(s, Tensor)]
        for blocks, gradient in zip(shards, gradients, strict=True):
            if isinstance(blocks, int8.Blocks):
                factor = _factor(coefficient, lr, gradient.device)
                int8.update(blocks, gradient, factor, 1 - lr * weight_decay, self._noise_for(blocks))
        for some, theirs in _alike(floats):
            compute, needs_copies = self._computation(some[0], theirs[0], coefficient, lr, 1 - lr * weight_decay)
            for few, of_few in pieces(some, theirs) if needs_copies else [(some, theirs)]:
                compute(few, of_few)

    def state(self) -> dict[str, Tensor]:
        """See ``Rule.state``."""
        if self.generator is None:
            return {}
        calls = torch.tensor(sorted(self.calls.items()), dtype=torch.int64).view(-1, 2)
        return {"generator": self.generator.get_state(), "calls": calls}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See ``Rule.load_state``."""
        if self.generator is not None and "generator" in state:  # there is none of a run that rounded to nearest
            self.generator.set_state(state["generator"])
            self.calls = defaultdict(int, state["calls"].tolist() if "calls" in state else [])

    def _computation(
        self, shard: Tensor, gradient: Tensor, coefficient: float | Tensor, lr: float, decay: float
    ) -> tuple[Computation, bool]:
        """How shards and gradients like these become new shards, and whether it copies them on the way."""
        if shard.dtype == torch.float32:
            single = _factor(coefficient, 1.0, gradient.device)
            copies = gradient.dtype != torch.float32
            return partial(update_single, coefficient=single, lr=lr, decay=decay), copies
        factor = _factor(coefficient, lr, gradient.device)
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

    def _noise_for(self, blocks: int8.Blocks) -> int8.Noise | None:
        if self.generator is None:
            return None
        step = self.calls[blocks.number]
        self.calls[blocks.number] = step + 1
        return int8.Noise(self.generator.initial_seed() % 2**64, blocks.number, step)

    def _next_call(self) -> tuple[int, int] | None:
        """Seed and number of a kernel's call. The generator counts them, so its state says where noise goes on."""
        if self.generator is None:
            return None
        offset = self.generator.get_offset()
        self.generator.set_offset(offset + 4)  # CUDA takes multiples of four only
        return self.generator.initial_seed(), offset // 4


def _factor(coefficient: float | Tensor, lr: float, device: torch.device) -> float | Tensor:
    """Their product; of a tensor rounded once to fp32, without waiting for the device."""
    if isinstance(coefficient, Tensor):
        return (coefficient.to(device, torch.float64, non_blocking=True) * lr).float()
    return coefficient * lr


def _alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Shards and gradients, apart by dtypes."""
    groups: dict[tuple[torch.dtype, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for shard, gradient in pairs:
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
