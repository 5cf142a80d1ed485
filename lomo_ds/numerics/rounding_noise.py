"""Random numbers of stochastic rounding: what every format draws from, saved and restored with a run."""

from collections import defaultdict

import torch
from torch import Tensor

from lomo_ds.numerics.int8 import Noise

PIECES = 2**20  # numbers of eight-bit tensors; a multiple of it is added for each further piece of a tensor


class RoundingNoise:
    """Source of the random numbers that round updated weights, different at every update.

    Args:
        generator: on the device of the weights.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.calls: dict[int, int] = defaultdict(int)  # number of updates of each eight-bit tensor, by its number

    def for_blocks(self, number: int, piece: int = 0) -> Noise:
        """Return the noise of the next update of an eight-bit tensor, or of one piece of it.

        Args:
            number: of the tensor, below ``PIECES``.
            piece: index of the piece; pieces must be asked for in the same order at every update.
        """
        key = number + piece * PIECES
        step = self.calls[key]
        self.calls[key] = step + 1
        return Noise(self.generator.initial_seed() % 2**64, key, step)

    def next_call(self) -> tuple[int, int]:
        """Return the seed and the number of the next kernel call, which the generator's state counts."""
        offset = self.generator.get_offset()
        self.generator.set_offset(offset + 4)  # CUDA accepts only multiples of four
        return self.generator.initial_seed(), offset // 4

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that ``load_state`` restores."""
        calls = torch.tensor(sorted(self.calls.items()), dtype=torch.int64).view(-1, 2)
        return {"generator": self.generator.get_state(), "calls": calls}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned; a run that rounded to nearest has saved nothing, and nothing changes."""
        if "generator" in state:
            self.generator.set_state(state["generator"])
            self.calls = defaultdict(int, state["calls"].tolist() if "calls" in state else [])
