"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import clamp_, pieces
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.rules.sgd_eager import update_half, update_single

logger = logging.getLogger(__name__)


class Sgd:
    """Plain SGD in fp32 arithmetic, without optimizer state.

    Args:
        generator: random generator for stochastic rounding of half-precision shards, on the compute device;
            None rounds to nearest.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.calls: dict[int, int] = defaultdict(int)  # number of updates of each int8 tensor, by tensor number

    def update(
        self,
        shards: Sequence[Values],
        gradients: Sequence[Tensor],
        coefficient: float | Tensor,
        lr: float,
        weight_decay: float,
        limit: float | None = None,
        squares: SquareSums | None = None,
    ) -> None:
        """Implement ``Rule.update``."""
        decay = 1 - lr * weight_decay
        floats: list[tuple[Tensor, Tensor]] = []
        for shard, gradient in zip(shards, gradients, strict=True):
            if isinstance(shard, Tensor):
                floats.append((shard, gradient))
                continue
            factor = _factor(coefficient, lr, gradient.device)
            slots = None if squares is None else squares.take(gradient.numel())
            int8.update(shard, gradient, factor, decay, self._noise_for(shard), limit, slots)
        for group_shards, group_gradients in _group_by_dtype(floats):
            kernel = kernel_for(group_gradients[0].device)
            # fp32 weights need no rounding: torch updates them all in one or two launches and reads gradients once too
            if kernel is not None and (squares is not None or group_shards[0].dtype != torch.float32):
                factor = _factor(coefficient, lr, group_gradients[0].device)
                self._launch(kernel, group_shards, group_gradients, factor, decay, limit, squares)
            else:
                assert squares is None, "sums of squares need a kernel"
                self._update_in_torch(group_shards, group_gradients, coefficient, lr, decay, limit)

    def square_sums(self, numels: Sequence[int], device: torch.device) -> SquareSums | None:
        """Implement ``Rule.square_sums``."""
        return None if kernel_for(device) is None else SquareSums(numels, device)

    def state(self) -> dict[str, Tensor]:
        """Implement ``Rule.state``."""
        if self.generator is None:
            return {}
        calls = torch.tensor(sorted(self.calls.items()), dtype=torch.int64).view(-1, 2)
        return {"generator": self.generator.get_state(), "calls": calls}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Implement ``Rule.load_state``."""
        if self.generator is not None and "generator" in state:  # a run that rounded to nearest has saved no generator
            self.generator.set_state(state["generator"])
            self.calls = defaultdict(int, state["calls"].tolist() if "calls" in state else [])

    def _launch(
        self,
        kernel: ModuleType,
        shards: list[Tensor],
        gradients: list[Tensor],
        factor: float | Tensor,
        decay: float,
        limit: float | None,
        squares: SquareSums | None,
    ) -> None:
        """Update each shard with one kernel launch that reads its gradient once."""
        for shard, gradient in zip(shards, gradients, strict=True):
            noise = None if shard.dtype == torch.float32 else self._next_call()
            slots = None if squares is None else squares.take(gradient.numel())
            kernel.update(shard, gradient, factor, decay, noise, limit, slots)

    def _update_in_torch(
        self,
        shards: list[Tensor],
        gradients: list[Tensor],
        coefficient: float | Tensor,
        lr: float,
        decay: float,
        limit: float | None,
    ) -> None:
        """Update all shards together with PyTorch operations, in pieces if they need temporary copies."""
        if limit is not None:
            for gradient in gradients:
                clamp_(gradient, limit)
        device = gradients[0].device
        compute: Callable[[list[Tensor], list[Tensor]], None]
        if shards[0].dtype == torch.float32:
            single = _factor(coefficient, 1.0, device)
            compute = partial(update_single, coefficient=single, lr=lr, decay=decay)
        else:
            factor = _factor(coefficient, lr, device)
            compute = partial(update_half, factor=factor, decay=decay, generator=self.generator)
        copies = shards[0].dtype != torch.float32 or gradients[0].dtype != torch.float32
        for shard_parts, gradient_parts in pieces(shards, gradients) if copies else [(shards, gradients)]:
            compute(shard_parts, gradient_parts)

    def _noise_for(self, blocks: int8.Blocks) -> int8.Noise | None:
        if self.generator is None:
            return None
        step = self.calls[blocks.number]
        self.calls[blocks.number] = step + 1
        return int8.Noise(self.generator.initial_seed() % 2**64, blocks.number, step)

    def _next_call(self) -> tuple[int, int] | None:
        """Return the seed and number of the next kernel call, which the generator's state counts."""
        if self.generator is None:
            return None
        offset = self.generator.get_offset()
        self.generator.set_offset(offset + 4)  # CUDA accepts only multiples of four
        return self.generator.initial_seed(), offset // 4


def _factor(coefficient: float | Tensor, lr: float, device: torch.device) -> float | Tensor:
    """Return ``coefficient * lr``; a tensor result is rounded once to fp32, and the host does not wait for it."""
    if isinstance(coefficient, Tensor):
        return (coefficient.to(device, torch.float64, non_blocking=True) * lr).float()
    return coefficient * lr


def _group_by_dtype(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Group shards and gradients by their dtypes."""
    groups: dict[tuple[torch.dtype, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for shard, gradient in pairs:
        key = (shard.dtype, gradient.dtype)
        group = groups.setdefault(key, ([], []))
        group[0].append(shard)
        group[1].append(gradient)
    return groups.values()


@functools.cache
def kernel_for(device: torch.device) -> ModuleType | None:
    """Return the module ``sgd_kernel`` after a trial run; None if not on a GPU or if Triton fails (with a warning)."""
    if device.type != "cuda":
        return None
    try:
        from lomo_ds.update.rules import sgd_kernel

        trial = torch.zeros(1, dtype=torch.bfloat16, device=device)
        squares = torch.empty(1, dtype=torch.float32, device=device)
        sgd_kernel.update(trial, trial.clone(), 1.0, 1.0, (0, 0), None, squares)
    except Exception as error:  # no Triton, no C compiler, an unsupported GPU: each raises another type
        logger.warning("weights are updated in several passes over memory, because Triton fails: %s", error)
        return None
    return sgd_kernel
