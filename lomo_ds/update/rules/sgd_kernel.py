"""SGD on a shard as a Triton kernel in one pass over memory: read, add up squares, clamp, update, round, write.

To import this file is to import triton, which not every machine has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lomo_ds.numerics.square_sums import PROGRAM_NUMEL, slots_of
from lomo_ds.numerics.triton_launch import Launcher, alignment

# Unfused, product and difference are rounded apart, as they are in eager mode.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = tl.constexpr(8 * 32 * 4)  # 8 neighbours for each thread: 16 bytes, the widest load there is
BLOCKS = tl.constexpr(8)  # of a program; one call of Philox gives a lane 4 words, 16 bits for each of 8 blocks
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al., SC 2011, table 2)
FP16_SMALLEST_NORMAL = tl.constexpr(2.0**-14)
assert BLOCK.value * BLOCKS.value == PROGRAM_NUMEL


def update(
    shard: Tensor,
    gradient: Tensor,
    factor: float | Tensor,
    decay: float,
    noise: tuple[int, int] | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """Write ``decay * shard - factor * gradient`` into ``shard``, rounded once, without waiting for the device.

    Into half precision product and difference are rounded to fp32 for themselves, as by ``update_half``; into fp32 they
    are rounded together, as torch.optim.SGD does.

    Args:
        shard: 1-D and contiguous, bfloat16, float16 or float32, on the current device.
        gradient: as long as ``shard``, contiguous, on its device; any float dtype.
        factor: a float, or, unless ``shard`` is fp32, a 0-dim fp32 tensor on the same device.
        noise: seed and number of this call, both below 2 ** 64, for stochastic rounding: the same two give the same
            bits, and others independent ones. None rounds to nearest, as an fp32 ``shard`` must.
        limit: magnitude that gradients are clamped to first; None leaves them as they are.
        squares: 1-D fp32, a slot for each program of 8192 elements, to be filled with the sum of squares of the
            gradients that the program has read, before they are clamped. The same gradients give the same bits.
    """
    assert shard.shape == gradient.shape
    assert shard.is_contiguous()
    assert gradient.is_contiguous()
    assert shard.numel() < 2**35, "32 bits number the lanes"
    assert shard.dtype != torch.float32 or (noise is None and not isinstance(factor, Tensor))
    programs = slots_of(shard.numel())
    assert squares is None or squares.shape == (programs,)
    if programs == 0:
        return
    seed, call = noise or (0, 0)
    in_memory = isinstance(factor, Tensor)
    aligned = alignment(shard.data_ptr(), gradient.data_ptr())
    compiled_for = (in_memory, limit is None, squares is None, noise is None)
    _launch_sgd(
        (programs, 1, 1),
        (shard.device, shard.dtype, gradient.dtype, aligned, compiled_for),
        shard,
        gradient,
        factor if in_memory else float(factor),  # an int would be compiled in
        float(decay),
        None if limit is None else min(float(limit), torch.finfo(gradient.dtype).max),
        squares,
        shard.numel(),
        seed,
        call,
        in_memory,
        noise is not None,
    )


# A launch's ``squares`` begin anywhere in a buffer; where that is at a multiple of 16 bytes must not compile anew.
@triton.jit(do_not_specialize=["numel", "seed", "call"], do_not_specialize_on_alignment=["factor", "squares"])
def _sgd(
    weights: tl.tensor,
    gradients: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    numel: tl.int64,
    seed: tl.uint64,
    call: tl.uint64,
    FACTOR_IN_MEMORY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """One program updates ``BLOCKS`` blocks of ``BLOCK`` neighbours; lane i has element i of each."""
    if FACTOR_IN_MEMORY:
        factor = tl.load(factor)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    left = numel - start
    weights, gradients = weights + start, gradients + start
    if left >= BLOCK * BLOCKS:  # a mask of any length would rule out wide loads
        _blocks(weights, gradients, factor, decay, limit, squares, left, seed, call, STOCHASTIC, False)
    else:
        _blocks(weights, gradients, factor, decay, limit, squares, left, seed, call, STOCHASTIC, True)


_launch_sgd = Launcher(_sgd, OPTIONS)


@triton.jit
def _blocks(
    weights: tl.tensor,
    gradients: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    left: tl.tensor,
    seed: tl.tensor,
    call: tl.tensor,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if STOCHASTIC:
        words = _random_words(seed, call, lanes)
    loaded = _load(weights, gradients, 0, lanes, left, MASKED)
    for block in tl.static_range(BLOCKS):
        weight, gradient = loaded
        if block + 1 < BLOCKS and not MASKED:  # ahead of the store, for the compiler takes no load across one
            loaded = _load(weights, gradients, block + 1, lanes, left, MASKED)
        exact = gradient.to(tl.float32)
        if squares is not None:
            total += exact * exact
        if limit is not None:
            exact = _clamped(exact, limit, gradients.dtype.element_ty)
        updated = _step(weight, exact, factor, decay)
        if STOCHASTIC:
            noise = (words[block // 2] >> (16 * (block % 2))) & 0xFFFF
            rounded = _round_at_random(updated, noise.to(tl.int32), weights.dtype.element_ty)
        else:
            rounded = _round_to_nearest(updated, weights.dtype.element_ty)
        places = block * BLOCK + lanes
        tl.store(weights + places, rounded, places < left if MASKED else None)
        if block + 1 < BLOCKS and MASKED:  # ahead, masks would need registers that the program above wants
            loaded = _load(weights, gradients, block + 1, lanes, left, MASKED)
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def _step(weight: tl.tensor, gradient: tl.tensor, factor: tl.tensor, decay: tl.tensor) -> tl.tensor:
    """``decay * weight - factor * gradient`` in fp32."""
    decayed = weight.to(tl.float32) * decay
    if weight.dtype == tl.float32:
        return tl.fma(-gradient, tl.full(gradient.shape, factor, tl.float32), decayed)
    return decayed - gradient * factor


@triton.jit
def _clamped(values: tl.tensor, limit: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """To [-limit, limit], which gradients' ``dtype`` rounds first, as in eager mode; nan stays."""
    limit = _round_to_nearest(tl.full(values.shape, limit, tl.float32), dtype).to(tl.float32)
    values = tl.where(values > limit, limit, values)
    return tl.where(values < -limit, -limit, values)


@triton.jit
def _load(
    weights: tl.tensor,
    gradients: tl.tensor,
    block: tl.constexpr,
    lanes: tl.tensor,
    left: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """This block of both."""
    places = block * BLOCK + lanes
    mask = places < left if MASKED else None
    return tl.load(weights + places, mask), tl.load(gradients + places, mask, 0 if MASKED else None)


@triton.jit
def _random_words(seed: tl.tensor, call: tl.tensor, lanes: tl.tensor) -> tuple[tl.tensor, ...]:
    """Four uint32 for each lane of this program; the counter is (lane, 0, call)."""
    lane = tl.program_id(0).to(tl.uint32) * BLOCK + lanes.to(tl.uint32)
    zeros = lane * 0
    call = call.to(tl.uint64)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    return tl.philox(seed, lane, zeros, zeros + low, zeros + high, PHILOX_ROUNDS)


@triton.jit
def _round_at_random(exact: tl.tensor, noise: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """As ``numerics.stochastic_round``, from 16 random bits."""
    if dtype == tl.float16:
        lift = tl.where(tl.abs(exact) < FP16_SMALLEST_NORMAL, FP16_SMALLEST_NORMAL, 0.0)
        lift = tl.where(exact < 0, -lift, lift)
        return (_clear_low_bits(exact + lift, noise >> 3, 13) - lift).to(dtype)
    return _clear_low_bits(exact, noise, 16).to(dtype)


@triton.jit
def _round_to_nearest(exact: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Ties to even; by hand for bfloat16, which Triton's interpreter would cut off."""
    if dtype != tl.bfloat16:
        return exact.to(dtype)
    odd = (exact.to(tl.int32, bitcast=True) >> 16) & 1
    return _clear_low_bits(exact, 0x7FFF + odd, 16).to(dtype)


@triton.jit
def _clear_low_bits(values: tl.tensor, noise: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Add ``noise`` to the low bits of fp32 and clear them: a carry is a step up in magnitude. inf and nan stay."""
    bits = (values.to(tl.int32, bitcast=True) + noise) & -(1 << BITS)
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
