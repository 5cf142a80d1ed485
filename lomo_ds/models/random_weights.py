"""Random weights drawn piece by piece, so that a seed gives the same model for any world size."""

import hashlib
import math

import torch
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div

CHUNK_NUMEL = 2**20  # number of elements that are drawn from one generator


def random_piece(name: str, shape: torch.Size, start: int, stop: int, std: float, seed: int) -> Tensor:
    """Draw elements ``start`` to ``stop`` of the flattened parameter ``name``, initialized as in LLaMA; 1-D float32.

    Matrices are normal with mean 0 and standard deviation ``std``, norm weights are 1, biases are 0.
    """
    if name.endswith("bias"):
        return torch.zeros(stop - start)
    if len(shape) < 2:
        return torch.ones(stop - start)
    numel = math.prod(shape)
    piece = torch.empty(stop - start)
    for chunk in range(start // CHUNK_NUMEL, ceil_div(stop, CHUNK_NUMEL)):
        first = chunk * CHUNK_NUMEL
        drawn = _chunk(name, chunk, min(CHUNK_NUMEL, numel - first), std, seed)
        lower, upper = max(start, first), min(stop, first + len(drawn))
        piece[lower - start : upper - start] = drawn[lower - first : upper - first]
    return piece


def _chunk(name: str, chunk: int, numel: int, std: float, seed: int) -> Tensor:
    key = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.empty(numel).normal_(0.0, std, generator=generator)
