"""Application of an update to a float shard as a one-pass Triton kernel: read, sum squares, clamp, round, write.

Importing this module imports triton, which is not available on every machine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lomo_ds.numerics.square_sums import PROGRAM_NUMEL, program_count
from lomo_ds.numerics.triton_launch import Launcher, alignment

# Without FMA fusion, product and difference are rounded separately, as in eager mode.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = tl.constexpr(8 * 32 * 4)  # 8 adjacent elements per thread: 16 bytes, the widest load
BLOCKS = tl.constexpr(8)  # blocks per program; one Philox call gives a lane 4 words: 16 bits for each of 8 blocks
PHILOX_ROUNDS = tl.constexpr(7)  # the smallest number that passes BigCrush (Salmon et al., SC 2011, table 2)
FP16_SMALLEST_NORMAL = tl.constexpr(2.0**-14)
assert BLOCK.value * BLOCKS.value == PROGRAM_NUMEL


def update(
    shard: Tensor,
    direction: Tensor,
    factor: float | Tensor,
    decay: float | Tensor,
    noise: tuple[int, int] | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """Write ``decay * shard - factor * direction`` into ``shard``, rounded once, without waiting for the device.

    For half-precision shards, product and difference are rounded to fp32 separately, as in ``update_half``. For fp32
    shards they are computed with one rounding (FMA), as in torch.optim.SGD.

    Args:
        shard: 1-D and contiguous, bfloat16, float16 or float32, on the current device.
        direction: contiguous, with the length and device of ``shard``; any float dtype.
        factor, decay: floats; or 0-dim fp32 tensors on the same device, unless ``shard`` is fp32.
        noise: seed and number of this call for stochastic rounding, both below 2 ** 64. Equal pairs give equal random
            bits, and different pairs give independent ones. None rounds to nearest, and is required for fp32.
        limit: maximum magnitude that directions are clamped to first; None does not clamp.
        squares: 1-D fp32 output with one slot per program of 8192 elements. Each program writes the sum of squares of
            its directions before clamping; the result is deterministic.
    """
    assert shard.shape == direction.shape
    assert shard.is_contiguous()
    assert direction.is_contiguous()
    assert shard.numel() < 2**35, "lane numbers must fit in 32 bits"
    in_memory = isinstance(factor, Tensor), isinstance(decay, Tensor)
    assert shard.dtype != torch.float32 or (noise is None and not any(in_memory))
    programs = program_count(shard.numel())
    assert squares is None or squares.shape == (programs,)
    if programs == 0:
        return
    seed, call = noise or (0, 0)
    aligned = alignment(shard.data_ptr(), direction.data_ptr())
    compiled_for = (*in_memory, limit is None, squares is None, noise is None)
    _launch_apply(
        (programs, 1, 1),
        (shard.device, shard.dtype, direction.dtype, aligned, compiled_for),
        shard,
        direction,
        factor if in_memory[0] else float(factor),  # an int could be compiled in as a constant
        decay if in_memory[1] else float(decay),
        None if limit is None else min(float(limit), torch.finfo(direction.dtype).max),
        squares,
        shard.numel(),
        seed,
        call,
        *in_memory,
        noise is not None,
    )


# ``squares`` may start anywhere in a buffer; its alignment must not cause another compilation.
@triton.jit(do_not_specialize=["numel", "seed", "call"], do_not_specialize_on_alignment=["factor", "decay", "squares"])
def _apply(
    weights: tl.tensor,
    directions: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    numel: tl.int64,
    seed: tl.uint64,
    call: tl.uint64,
    FACTOR_IN_MEMORY: tl.constexpr,
    DECAY_IN_MEMORY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Update ``BLOCKS`` blocks of ``BLOCK`` adjacent elements per program; lane i handles element i of each block."""
    if FACTOR_IN_MEMORY:
        factor = tl.load(factor)
    if DECAY_IN_MEMORY:
        decay = tl.load(decay)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    remaining = numel - start
    weights, directions = weights + start, directions + start
    if remaining >= BLOCK * BLOCKS:  # a mask would prevent wide loads
        _blocks(weights, directions, factor, decay, limit, squares, remaining, seed, call, STOCHASTIC, False)
    else:
        _blocks(weights, directions, factor, decay, limit, squares, remaining, seed, call, STOCHASTIC, True)


_launch_apply = Launcher(_apply, OPTIONS)


@triton.jit
def _blocks(
    weights: tl.tensor,
    directions: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    remaining: tl.tensor,
    seed: tl.tensor,
    call: tl.tensor,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if STOCHASTIC:
        words = _random_words(seed, call, lanes)
    loaded = _load(weights, directions, 0, lanes, remaining, MASKED)
    for block in tl.static_range(BLOCKS):
        weight, direction = loaded
        if block + 1 < BLOCKS and not MASKED:  # before the store, because the compiler moves no load across a store
            loaded = _load(weights, directions, block + 1, lanes, remaining, MASKED)
        exact = direction.to(tl.float32)
        if squares is not None:
            total += exact * exact
        if limit is not None:
            exact = _clamp(exact, limit, directions.dtype.element_ty)
        updated = _step(weight, exact, factor, decay)
        if STOCHASTIC:
            noise = (words[block // 2] >> (16 * (block % 2))) & 0xFFFF
            rounded = _round_stochastically(updated, noise.to(tl.int32), weights.dtype.element_ty)
        else:
            rounded = _round_to_nearest(updated, weights.dtype.element_ty)
        offsets = block * BLOCK + lanes
        tl.store(weights + offsets, rounded, offsets < remaining if MASKED else None)
        if block + 1 < BLOCKS and MASKED:  # after the store, because earlier masks would cost registers
            loaded = _load(weights, directions, block + 1, lanes, remaining, MASKED)
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def _step(weight: tl.tensor, direction: tl.tensor, factor: tl.tensor, decay: tl.tensor) -> tl.tensor:
    """Return ``decay * weight - factor * direction`` in fp32."""
    decayed = weight.to(tl.float32) * decay
    if weight.dtype == tl.float32:
        return tl.fma(-direction, tl.full(direction.shape, factor, tl.float32), decayed)
    return decayed - direction * factor


@triton.jit
def _clamp(values: tl.tensor, limit: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Clamp to [-limit, limit], with the limit rounded to the directions' ``dtype`` as in eager mode; nan stays nan."""
    limit = _round_to_nearest(tl.full(values.shape, limit, tl.float32), dtype).to(tl.float32)
    values = tl.where(values > limit, limit, values)
    return tl.where(values < -limit, -limit, values)


@triton.jit
def _load(
    weights: tl.tensor,
    directions: tl.tensor,
    block: tl.constexpr,
    lanes: tl.tensor,
    remaining: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load one block of weights and directions."""
    offsets = block * BLOCK + lanes
    mask = offsets < remaining if MASKED else None
    return tl.load(weights + offsets, mask), tl.load(directions + offsets, mask, 0 if MASKED else None)


@triton.jit
def _random_words(seed: tl.tensor, call: tl.tensor, lanes: tl.tensor) -> tuple[tl.tensor, ...]:
    """Return four random uint32 for each lane of this program; the Philox counter is (lane, 0, call)."""
    lane = tl.program_id(0).to(tl.uint32) * BLOCK + lanes.to(tl.uint32)
    zeros = lane * 0
    call = call.to(tl.uint64)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    return tl.philox(seed, lane, zeros, zeros + low, zeros + high, PHILOX_ROUNDS)


@triton.jit
def _round_stochastically(exact: tl.tensor, noise: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round like ``numerics.stochastic_round``, with 16 random bits."""
    if dtype == tl.float16:
        lift = tl.where(tl.abs(exact) < FP16_SMALLEST_NORMAL, FP16_SMALLEST_NORMAL, 0.0)
        lift = tl.where(exact < 0, -lift, lift)
        return (_clear_low_bits(exact + lift, noise >> 3, 13) - lift).to(dtype)
    return _clear_low_bits(exact, noise, 16).to(dtype)


@triton.jit
def _round_to_nearest(exact: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round to nearest, ties to even; done by hand for bfloat16, which Triton's interpreter would truncate."""
    if dtype != tl.bfloat16:
        return exact.to(dtype)
    odd = (exact.to(tl.int32, bitcast=True) >> 16) & 1
    return _clear_low_bits(exact, 0x7FFF + odd, 16).to(dtype)


@triton.jit
def _clear_low_bits(values: tl.tensor, noise: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Add ``noise`` to the low bits of fp32 values and clear them: a carry rounds up. inf and nan stay unchanged."""
    bits = (values.to(tl.int32, bitcast=True) + noise) & -(1 << BITS)
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
