"""Weights in eight bits on CUDA, each in one pass over memory, as Triton kernels: what modules compute with, and SGD.

To import this file is to import triton, which not every machine has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import eager as int8
from lomo_ds.numerics.triton_launch import Launcher, alignment

# Unfused, product and difference are rounded apart, as they are in eager mode.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = tl.constexpr(int8.BLOCK)
ROWS = tl.constexpr(1024 // int8.BLOCK)  # blocks of a tile
TILE = tl.constexpr(1024)  # 8 neighbours for each thread
TILES = tl.constexpr(8)  # of a program; one call of Philox gives a lane 4 words, 16 bits for each of 8 tiles
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al., SC 2011, table 2)
APART = tl.constexpr(0x696E7438)  # from counters that other kernels use with the same seed
LARGEST = tl.constexpr(int8.LARGEST)
SHRINK = tl.constexpr(int8.SHRINK)
SHARE = tl.constexpr(1 / int8.LARGEST)
SMALLEST_SCALE = tl.constexpr(int8.SMALLEST_SCALE)
INF_BITS = tl.constexpr(0x7F800000)
PROGRAM_NUMEL = TILE.value * TILES.value


def encode(values: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """What ``int8.encode`` returns, bit for bit, of contiguous ``values``, without waiting for the device."""
    codes, scales = out or int8.empty_like(values)
    _check(codes, scales, values)
    if codes.numel() > 0:
        aligned = alignment(values.data_ptr(), codes.data_ptr(), scales.data_ptr())
        key = (codes.device, values.dtype, aligned)
        _launch_encode((_programs(codes.numel()), 1, 1), key, values, codes, scales, codes.numel())
    return codes, scales


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write what ``int8.decode`` returns into ``out``, bit for bit, without waiting for the device.

    Args:
        codes, scales: 1-D; or 2-D, a tensor a row, all rows in one launch. Rows may lie apart, equally far for both.
        out: of the shape of ``codes``, contiguous, on their device; bfloat16, float16 or float32.
    """
    numel = codes.shape[-1]
    assert out.shape == codes.shape
    assert scales.shape == (*codes.shape[:-1], int8.block_count(numel))
    assert out.is_contiguous()
    assert codes.stride(-1) == scales.stride(-1) == 1
    if codes.numel() == 0:
        return
    rows = 1 if codes.dim() == 1 else len(codes)
    apart = (codes.stride(0), scales.stride(0), numel) if rows > 1 else (0, 0, 0)
    aligned = alignment(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), *apart)
    key = (codes.device, out.dtype, aligned)
    _launch_decode((_programs(numel), rows, 1), key, codes, scales, out, numel, *apart)


def update(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor,
    factor: float | Tensor,
    decay: float,
    noise: int8.Noise | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """Write ``decay * weight - factor * gradient`` as ``int8.update_`` does, without waiting for the device.

    Args:
        gradient: as long as ``codes``, contiguous, on their device; any float dtype.
        factor: a float, or a 0-dim fp32 tensor on the same device.
        noise: None rounds to nearest. The random numbers are other ones than those of ``int8.update_``.
        limit: magnitude that gradients are clamped to first; None leaves them as they are.
        squares: 1-D fp32, a slot for each program of 8192 elements, to be filled with the sum of squares of the
            gradients that the program has read, before they are clamped. The same gradients give the same bits.
    """
    _check(codes, scales, gradient)
    assert codes.numel() < 2**35, "32 bits number the lanes"
    assert squares is None or squares.shape == (_programs(codes.numel()),)
    if codes.numel() == 0:
        return
    drawn = noise or int8.Noise(0, 0, 0)
    in_memory = isinstance(factor, Tensor)
    aligned = alignment(codes.data_ptr(), scales.data_ptr(), gradient.data_ptr())
    compiled_for = (in_memory, limit is None, squares is None, noise is None)
    _launch_update(
        (_programs(codes.numel()), 1, 1),
        (codes.device, gradient.dtype, aligned, compiled_for),
        codes,
        scales,
        gradient,
        factor if in_memory else float(factor),  # an int would be compiled in
        float(decay),
        None if limit is None else min(float(limit), torch.finfo(gradient.dtype).max),
        squares,
        codes.numel(),
        drawn.seed,
        drawn.shard,
        drawn.window,
        drawn.shift,
        in_memory,
        noise is not None,
    )


def _check(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    assert codes.shape == values.shape
    assert scales.shape == (int8.block_count(codes.numel()),)
    assert all(tensor.is_contiguous() for tensor in (codes, scales, values))


def _programs(numel: int) -> int:
    return ceil_div(numel, PROGRAM_NUMEL)


@triton.jit(do_not_specialize=["numel"])
def _encode(values: tl.tensor, codes: tl.tensor, scales: tl.tensor, numel: tl.int64) -> None:
    """One program reads ``TILES`` tiles of ``ROWS`` blocks."""
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    values, codes, scales = values + first * TILE, codes + first * TILE, scales + first * ROWS
    if left >= TILE * TILES:  # a mask of any length would rule out wide loads
        for tile in tl.static_range(TILES):
            _encode_tile(values, codes, scales, tile, left, False)
    else:
        for tile in tl.static_range(TILES):
            _encode_tile(values, codes, scales, tile, left, True)


_launch_encode = Launcher(_encode, OPTIONS)


@triton.jit
def _encode_tile(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tile: tl.constexpr,
    left: tl.tensor,
    MASKED: tl.constexpr,
) -> None:
    places, blocks = _places(tile)
    mask = places < left if MASKED else None
    exact = tl.load(values + places, mask, 0 if MASKED else None).to(tl.float32)
    bits, largest = _largest(exact)
    wanted = _to_nearest(tl.maximum(largest * SHARE, SMALLEST_SCALE), tl.bfloat16).to(tl.float32)
    scale = tl.where(bits < INF_BITS, wanted, float("nan"))
    tl.store(codes + places, _nearest_codes(_multiple(exact, scale), scale), mask)
    tl.store(scales + blocks, scale.to(scales.dtype.element_ty), blocks * BLOCK < left if MASKED else None)


@triton.jit(do_not_specialize=["numel"])
def _decode(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    numel: tl.int64,
    codes_apart: tl.int64,
    scales_apart: tl.int64,
    out_apart: tl.int64,
) -> None:
    """One program writes ``TILES`` tiles of ``ROWS`` blocks of a row.

    The distances between rows are specialized, unlike ``numel``: as multiples of 16 they allow wide loads.
    """
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    row = tl.program_id(1).to(tl.int64)
    codes, scales = codes + row * codes_apart + first * TILE, scales + row * scales_apart + first * ROWS
    out = out + row * out_apart + first * TILE
    if left >= TILE * TILES:  # a mask of any length would rule out wide loads
        for tile in tl.static_range(TILES):
            _decode_tile(codes, scales, out, tile, left, False)
    else:
        for tile in tl.static_range(TILES):
            _decode_tile(codes, scales, out, tile, left, True)


_launch_decode = Launcher(_decode, OPTIONS)


@triton.jit
def _decode_tile(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    tile: tl.constexpr,
    left: tl.tensor,
    MASKED: tl.constexpr,
) -> None:
    places, blocks = _places(tile)
    mask = places < left if MASKED else None
    code = tl.load(codes + places, mask)
    scale = tl.load(scales + blocks, blocks * BLOCK < left if MASKED else None).to(tl.float32)
    value = code.to(tl.float32) * scale
    tl.store(out + places, _to_nearest(value, out.dtype.element_ty), mask)


# A launch's ``squares`` begin anywhere in a buffer; where that is at a multiple of 16 bytes must not compile anew.
@triton.jit(
    do_not_specialize=["numel", "seed", "shard", "window", "shift"],
    do_not_specialize_on_alignment=["factor", "squares"],
)
def _update(
    codes: tl.tensor,
    scales: tl.tensor,
    gradients: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    numel: tl.int64,
    seed: tl.uint64,
    shard: tl.int64,
    window: tl.int64,
    shift: tl.int64,
    FACTOR_IN_MEMORY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """One program updates ``TILES`` tiles of ``ROWS`` blocks; lane i has element i of each."""
    if FACTOR_IN_MEMORY:
        factor = tl.load(factor)
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    codes, scales, gradients = codes + first * TILE, scales + first * ROWS, gradients + first * TILE
    if left >= TILE * TILES:
        _tiles(
            codes, scales, gradients, factor, decay, limit, squares, left, seed, shard, window, shift, STOCHASTIC, False
        )
    else:
        _tiles(
            codes, scales, gradients, factor, decay, limit, squares, left, seed, shard, window, shift, STOCHASTIC, True
        )


_launch_update = Launcher(_update, OPTIONS)


@triton.jit
def _tiles(
    codes: tl.tensor,
    scales: tl.tensor,
    gradients: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    limit: tl.tensor,
    squares: tl.tensor,
    left: tl.tensor,
    seed: tl.tensor,
    shard: tl.tensor,
    window: tl.tensor,
    shift: tl.tensor,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    total = tl.zeros([ROWS], tl.float32)
    if STOCHASTIC:
        words = _random_words(seed, shard, window)
    loaded = _load(codes, scales, gradients, 0, left, MASKED)
    for tile in tl.static_range(TILES):
        code, scale, gradient = loaded
        if tile + 1 < TILES and not MASKED:  # ahead of the store, for the compiler takes no load across one
            loaded = _load(codes, scales, gradients, tile + 1, left, MASKED)
        scale, gradient = scale.to(tl.float32), gradient.to(tl.float32)
        if squares is not None:
            total += tl.sum(gradient * gradient, axis=1)  # summing whole tiles would spill registers
        if limit is not None:
            gradient = _clamped(gradient, limit, gradients.dtype.element_ty)
        exact = code.to(tl.float32) * scale * decay
        exact -= gradient * factor
        scale = _kept_or_renewed(scale, exact)
        multiple = _multiple(exact, scale)
        if STOCHASTIC:
            began = (words[tile // 2] >> (16 * (tile % 2))).to(tl.int32)
            multiple = tl.minimum(tl.maximum(multiple, -LARGEST), LARGEST) + _noise(began + shift.to(tl.int32))
        places, blocks = _places(tile)
        tl.store(codes + places, _nearest_codes(multiple, scale), places < left if MASKED else None)
        mask_of_blocks = blocks * BLOCK < left if MASKED else None
        tl.store(scales + blocks, scale.to(scales.dtype.element_ty), mask_of_blocks)
        if tile + 1 < TILES and MASKED:  # ahead, masks would need registers that the program above wants
            loaded = _load(codes, scales, gradients, tile + 1, left, MASKED)
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def _load(
    codes: tl.tensor,
    scales: tl.tensor,
    gradients: tl.tensor,
    tile: tl.constexpr,
    left: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Codes, scales and gradients of a tile."""
    places, blocks = _places(tile)
    mask = places < left if MASKED else None
    code = tl.load(codes + places, mask, 0 if MASKED else None)
    scale = tl.load(scales + blocks, blocks * BLOCK < left if MASKED else None, 1 if MASKED else None)
    return code, scale, tl.load(gradients + places, mask, 0 if MASKED else None)


@triton.jit
def _clamped(values: tl.tensor, limit: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """To [-limit, limit], which gradients' ``dtype`` rounds first, as in eager mode; nan stays."""
    limit = _to_nearest(tl.full(values.shape, limit, tl.float32), dtype).to(tl.float32)
    values = tl.where(values > limit, limit, values)
    return tl.where(values < -limit, -limit, values)


@triton.jit
def _places(tile: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where the elements of a program's tile lie, (ROWS, BLOCK), and the scales of its blocks, (ROWS, 1)."""
    blocks = tile * ROWS + tl.arange(0, ROWS)[:, None]
    return blocks * BLOCK + tl.arange(0, BLOCK)[None, :], blocks


@triton.jit
def _random_words(seed: tl.tensor, shard: tl.tensor, window: tl.tensor) -> tuple[tl.tensor, ...]:
    """Four uint32 for each lane of this program; the counter is (lane, window, shard, ``APART``)."""
    lanes, _ = _places(0)
    lane = tl.program_id(0).to(tl.uint32) * TILE + lanes.to(tl.uint32)
    zeros = lane * 0
    return tl.philox(
        seed, lane, zeros + window.to(tl.uint32), zeros + shard.to(tl.uint32), zeros + APART, PHILOX_ROUNDS
    )


@triton.jit
def _kept_or_renewed(scale: tl.tensor, exact: tl.tensor) -> tl.tensor:
    """Of the block in each row, as a bfloat16 can hold it; nan for a block with an inf or a nan in it."""
    bits, largest = _largest(exact)
    limit = scale * LARGEST
    keeps = (largest <= limit) & (largest >= limit * SHRINK)
    wanted = (largest * SHARE).to(tl.int32, bitcast=True)
    up = ((wanted + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    renewed = tl.where(bits < INF_BITS, tl.maximum(up, SMALLEST_SCALE), float("nan"))
    return tl.where(keeps, scale, renewed)


@triton.jit
def _largest(exact: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest magnitude of each row and its bits; those of a nan are above all."""
    bits = tl.max(exact.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    return bits, bits.to(tl.float32, bitcast=True)


@triton.jit
def _multiple(exact: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """``exact`` over its row's scale, correctly rounded, with one division a row.

    The quotient by the reciprocal is off by an ulp or none, and one step of Newton's method with an exact remainder
    mends it (Markstein, IBM J. Res. Dev. 34, 1990): for each scale that a bfloat16 can hold, tried with every fp32
    mantissa.
    """
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), exact.shape)
    scale = tl.broadcast_to(scale, exact.shape)
    quotient = exact * inverse
    return tl.fma(tl.fma(-quotient, scale, exact), inverse, quotient)


@triton.jit
def _nearest_codes(multiple: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The nearest whole numbers, ties to even, of magnitudes below 128; 0 where the row's scale is nan.

    They are the low byte of a sum in whose binade the whole numbers are the steps: a conversion takes four times as
    long as an addition.
    """
    bits = (multiple + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2 ** 23
    return tl.where(scale == scale, bits, 0).to(tl.int8)


@triton.jit
def _noise(bits: tl.tensor) -> tl.tensor:
    """The middle of one of 2 ** 16 parts of (-0.5, 0.5), which the low 16 bits number.

    To add it and round to nearest is to round at random, without a slow ``floor``.
    """
    return ((bits & 0xFFFF) << 7 | 0x3F800040).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def _to_nearest(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Ties to even; by hand for bfloat16, which Triton's interpreter would cut off."""
    if dtype != tl.bfloat16:
        return values.to(dtype)
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(values == values, rounded, values).to(dtype)
