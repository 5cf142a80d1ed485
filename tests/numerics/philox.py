"""Numpy reference of the kernel's stochastic rounding: Philox4x32, and an addition to the bits of fp32 values."""

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def philox(counter: list[np.ndarray], key: int, rounds: int) -> list[np.ndarray]:
    """Return four 32-bit words for each counter of four 32-bit words, all as uint64 (Salmon et al., SC 2011)."""
    low, high = key & LOW, key >> 32
    for _ in range(rounds):
        left, right = counter[0] * np.uint64(MULTIPLIERS[0]), counter[2] * np.uint64(MULTIPLIERS[1])
        counter = [
            (right >> np.uint64(32)) ^ counter[1] ^ np.uint64(low),
            right & np.uint64(LOW),
            (left >> np.uint64(32)) ^ counter[3] ^ np.uint64(high),
            left & np.uint64(LOW),
        ]
        low, high = (low + WEYL[0]) & LOW, (high + WEYL[1]) & LOW
    return counter


def noise(numel: int, seed: int, call: int, lanes: int = 1024, blocks: int = 8) -> Tensor:
    """Return 16 random bits per element; lane i of a program uses half a word for element i of each block."""
    programs = -(-numel // (lanes * blocks))
    counters = np.arange(programs * lanes, dtype=np.uint64)
    rest = [np.full_like(counters, word) for word in (0, call & LOW, call >> 32)]
    words = philox([counters, *rest], seed, rounds=7)
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    of_program = np.stack(halves).reshape(blocks, programs, lanes).swapaxes(0, 1)
    return torch.from_numpy(of_program.reshape(-1)[:numel].astype(np.int64))


def rounded(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round finite fp32 ``values`` to bfloat16, or to float16 above 2 ** -14; a carry of the noise rounds up."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    sums = values.view(torch.int32).to(torch.int64) + (bits >> (16 - dropped))
    return (sums >> dropped << dropped).to(torch.int32).view(torch.float32).to(dtype)
