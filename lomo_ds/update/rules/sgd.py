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
        limit: float | None = None,
        squares: SquareSums | None = None,
    ) -> None:
        """See ``Rule.update``."""
        decay = 1 - lr * weight_decay
        floats: list[tuple[Tensor, Tensor]] = []
        for shard, gradient in zip(shards, gradients, strict=True):
            if isinstance(shard, Tensor):
                floats.append((shard, gradient))
                continue
            factor = _factor(coefficient, lr, gradient.device)
            slots = None if squares is None else squares.take(gradient.numel())
            int8.update(shard, gradient, factor, decay, self._noise_for(shard), limit, slots)
        for alike, of_alike in _alike(floats):
            kernel = kernel_for(of_alike[0].device)
            # fp32 weights are not rounded: torch updates all of them in a launch or two, and reads a gradient once too
            if kernel is not None and (squares is not None or alike[0].dtype != torch.float32):
                factor = _factor(coefficient, lr, of_alike[0].device)
                self._launch(kernel, alike, of_alike, factor, decay, limit, squares)
            else:
                assert squares is None, "there are none without a kernel"
                self._update_in_torch(alike, of_alike, coefficient, lr, decay, limit)

    def square_sums(self, numels: Sequence[int], device: torch.device) -> SquareSums | None:
        """See ``Rule.square_sums``."""
        return None if kernel_for(device) is None else SquareSums(numels, device)

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
        """Update each shard in one launch, which reads its gradient once."""
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
        """Update shards together, in pieces where they are copied on the way."""
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
        for part, of_part in pieces(shards, gradients) if copies else [(shards, gradients)]:
            compute(part, of_part)

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
        from lomo_ds.update.rules import sgd_kernel

        trial = torch.zeros(1, dtype=torch.bfloat16, device=device)
        squares = torch.empty(1, dtype=torch.float32, device=device)
        sgd_kernel.update(trial, trial.clone(), 1.0, 1.0, (0, 0), None, squares)
    except Exception as error:  # no Triton, no C compiler, a GPU it does not know: each has an exception of its own
        logger.warning("weights are updated in several passes over memory, for Triton fails: %s", error)
        return None
    return sgd_kernel
