"""Triton kernels for eight-bit weights: quantize, dequantize and update, each in one pass over memory.

This file imports triton, which is not installed on every machine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import eager as int8
from lomo_ds.numerics.triton_launch import Launcher, alignment

# Without fusion, product and difference are rounded separately, as in eager mode.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = tl.constexpr(int8.BLOCK)
ROWS = tl.constexpr(1024 // int8.BLOCK)  # blocks in a tile
TILE = tl.constexpr(1024)  # 8 adjacent elements for each thread
TILES = tl.constexpr(
    8
)  # tiles in a program; one Philox call gives a lane 4 words, which are 16 bits for each of 8 tiles
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al., SC 2011, table 2)
COUNTER_TAG = tl.constexpr(0x696E7438)  # keeps counters distinct from other kernels with the same seed
LARGEST = tl.constexpr(int8.LARGEST)
SHRINK = tl.constexpr(int8.SHRINK)
SHARE = tl.constexpr(1 / int8.LARGEST)
SMALLEST_SCALE = tl.constexpr(int8.SMALLEST_SCALE)
INF_BITS = tl.constexpr(0x7F800000)
PROGRAM_NUMEL = TILE.value * TILES.value


def encode(values: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantize contiguous ``values`` with the same bits as ``int8.encode``, without waiting for the device."""
    codes, scales = out or int8.empty_like(values)
    _check(codes, scales, values)
    if codes.numel() > 0:
        aligned = alignment(values.data_ptr(), codes.data_ptr(), scales.data_ptr())
        key = (codes.device, values.dtype, aligned)
        _launch_encode((_programs(codes.numel()), 1, 1), key, values, codes, scales, codes.numel())
    return codes, scales


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantize into ``out`` with the same bits as ``int8.decode``, without waiting for the device.

    Args:
        codes, scales: 1-D; or 2-D, a tensor a row, in one launch. The rows may have gaps between them.
        out: contiguous, of the shape and on the device of ``codes``; bfloat16, float16 or float32.
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
    direction: Tensor,
    factor: float | Tensor,
    decay: float | Tensor,
    noise: int8.Noise | None,
    limit: float | None = None,
    squares: Tensor | None = None,
) -> None:
    """Write ``decay * weight - factor * direction`` as ``int8.update_`` does, without waiting for the device.

    Args:
        direction: as long as ``codes``, contiguous, on the same device; any float dtype.
        factor, decay: floats, or 0-dim fp32 tensors on the same device.
        noise: None rounds to nearest. The random numbers differ from those of ``int8.update_``.
        limit: magnitude that directions are clamped to first; None does not clamp.
        squares: 1-D fp32, one slot for each program of 8192 elements, which receives the sum of squares of the
            program's directions before they are clamped. Equal directions give equal bits.
    """
    _check(codes, scales, direction)
    assert codes.numel() < 2**35, "lane numbers have 32 bits"
    assert squares is None or squares.shape == (_programs(codes.numel()),)
    if codes.numel() == 0:
        return
    seeds = noise or int8.Noise(0, 0, 0)
    in_memory = isinstance(factor, Tensor), isinstance(decay, Tensor)
    aligned = alignment(codes.data_ptr(), scales.data_ptr(), direction.data_ptr())
    compiled_for = (*in_memory, limit is None, squares is None, noise is None)
    _launch_update(
        (_programs(codes.numel()), 1, 1),
        (codes.device, direction.dtype, aligned, compiled_for),
        codes,
        scales,
        direction,
        factor if in_memory[0] else float(factor),  # an int would be compiled in
        decay if in_memory[1] else float(decay),
        None if limit is None else min(float(limit), torch.finfo(direction.dtype).max),
        squares,
        codes.numel(),
        seeds.seed,
        seeds.shard,
        seeds.window,
        seeds.shift,
        *in_memory,
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
    """Quantize ``TILES`` tiles of ``ROWS`` blocks in each program."""
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    values, codes, scales = values + first * TILE, codes + first * TILE, scales + first * ROWS
    if left >= TILE * TILES:  # masked loads could not be wide
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
    finite_scale = _to_nearest(tl.maximum(largest * SHARE, SMALLEST_SCALE), tl.bfloat16).to(tl.float32)
    scale = tl.where(bits < INF_BITS, finite_scale, float("nan"))
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
    """Dequantize ``TILES`` tiles of ``ROWS`` blocks of one row in each program.

    Row strides are specialized, unlike ``numel``: strides that are multiples of 16 allow wide loads.
    """
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    row = tl.program_id(1).to(tl.int64)
    codes, scales = codes + row * codes_apart + first * TILE, scales + row * scales_apart + first * ROWS
    out = out + row * out_apart + first * TILE
    if left >= TILE * TILES:  # masked loads could not be wide
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


# ``squares`` may start anywhere in a buffer; its alignment must not cause another compilation.
@triton.jit(
    do_not_specialize=["numel", "seed", "shard", "window", "shift"],
    do_not_specialize_on_alignment=["factor", "decay", "squares"],
)
def _update(
    codes: tl.tensor,
    scales: tl.tensor,
    directions: tl.tensor,
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
    DECAY_IN_MEMORY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Update ``TILES`` tiles of ``ROWS`` blocks in each program; lane i handles element i of each tile."""
    if FACTOR_IN_MEMORY:
        factor = tl.load(factor)
    if DECAY_IN_MEMORY:
        decay = tl.load(decay)
    first = tl.program_id(0).to(tl.int64) * TILES
    left = numel - first * TILE
    codes, scales, directions = codes + first * TILE, scales + first * ROWS, directions + first * TILE
    if left >= TILE * TILES:
        _tiles(
            codes,
            scales,
            directions,
            factor,
            decay,
            limit,
            squares,
            left,
            seed,
            shard,
            window,
            shift,
            STOCHASTIC,
            False,
        )
    else:
        _tiles(
            codes, scales, directions, factor, decay, limit, squares, left, seed, shard, window, shift, STOCHASTIC,
            True,
        )  # fmt: skip


_launch_update = Launcher(_update, OPTIONS)


@triton.jit
def _tiles(
    codes: tl.tensor,
    scales: tl.tensor,
    directions: tl.tensor,
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
    loaded = _load(codes, scales, directions, 0, left, MASKED)
    for tile in tl.static_range(TILES):
        code, scale, direction = loaded
        if tile + 1 < TILES and not MASKED:  # before the store, since the compiler moves no load across it
            loaded = _load(codes, scales, directions, tile + 1, left, MASKED)
        scale, direction = scale.to(tl.float32), direction.to(tl.float32)
        if squares is not None:
            total += tl.sum(direction * direction, axis=1)  # summing whole tiles would spill registers
        if limit is not None:
            direction = _clamped(direction, limit, directions.dtype.element_ty)
        exact = code.to(tl.float32) * scale * decay
        exact -= direction * factor
        scale = _keep_or_renew(scale, exact)
        multiple = _multiple(exact, scale)
        if STOCHASTIC:
            began = (words[tile // 2] >> (16 * (tile % 2))).to(tl.int32)
            multiple = tl.minimum(tl.maximum(multiple, -LARGEST), LARGEST) + _noise(began + shift.to(tl.int32))
        places, blocks = _places(tile)
        tl.store(codes + places, _nearest_codes(multiple, scale), places < left if MASKED else None)
        mask_of_blocks = blocks * BLOCK < left if MASKED else None
        tl.store(scales + blocks, scale.to(scales.dtype.element_ty), mask_of_blocks)
        if tile + 1 < TILES and MASKED:  # after the store, since masks would need registers that are in use above
            loaded = _load(codes, scales, directions, tile + 1, left, MASKED)
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def _load(
    codes: tl.tensor,
    scales: tl.tensor,
    directions: tl.tensor,
    tile: tl.constexpr,
    left: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Load the codes, scales and directions of a tile."""
    places, blocks = _places(tile)
    mask = places < left if MASKED else None
    code = tl.load(codes + places, mask, 0 if MASKED else None)
    scale = tl.load(scales + blocks, blocks * BLOCK < left if MASKED else None, 1 if MASKED else None)
    return code, scale, tl.load(directions + places, mask, 0 if MASKED else None)


@triton.jit
def _clamped(values: tl.tensor, limit: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Clamp to [-limit, limit], with the limit rounded to the directions' ``dtype`` as in eager mode; keep nan."""
    limit = _to_nearest(tl.full(values.shape, limit, tl.float32), dtype).to(tl.float32)
    values = tl.where(values > limit, limit, values)
    return tl.where(values < -limit, -limit, values)


@triton.jit
def _places(tile: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the offsets of a tile's elements, (ROWS, BLOCK), and of its scales, (ROWS, 1)."""
    blocks = tile * ROWS + tl.arange(0, ROWS)[:, None]
    return blocks * BLOCK + tl.arange(0, BLOCK)[None, :], blocks


@triton.jit
def _random_words(seed: tl.tensor, shard: tl.tensor, window: tl.tensor) -> tuple[tl.tensor, ...]:
    """Draw four uint32 for each lane of this program; the counter is (lane, window, shard, ``COUNTER_TAG``)."""
    lanes, _ = _places(0)
    lane = tl.program_id(0).to(tl.uint32) * TILE + lanes.to(tl.uint32)
    zeros = lane * 0
    return tl.philox(
        seed, lane, zeros + window.to(tl.uint32), zeros + shard.to(tl.uint32), zeros + COUNTER_TAG, PHILOX_ROUNDS
    )


@triton.jit
def _keep_or_renew(scale: tl.tensor, exact: tl.tensor) -> tl.tensor:
    """Return the new scale of each row's block, as fp32 that is exact in bfloat16; nan for a block with inf or nan."""
    bits, largest = _largest(exact)
    limit = scale * LARGEST
    keeps = (largest <= limit) & (largest >= limit * SHRINK)
    exact_scale = (largest * SHARE).to(tl.int32, bitcast=True)
    up = ((exact_scale + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    renewed = tl.where(bits < INF_BITS, tl.maximum(up, SMALLEST_SCALE), float("nan"))
    return tl.where(keeps, scale, renewed)


@triton.jit
def _largest(exact: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the largest magnitude of each row, and its bits; the bits of nan are larger than all others."""
    bits = tl.max(exact.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    return bits, bits.to(tl.float32, bitcast=True)


@triton.jit
def _multiple(exact: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Divide ``exact`` by the scale of its row, correctly rounded, with one division a row.

    Multiplying by the reciprocal is off by at most one ulp, which one Newton step with an exact remainder corrects
    (Markstein, IBM J. Res. Dev. 34, 1990). This was verified for every bfloat16 scale with every fp32 mantissa.
    """
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), exact.shape)
    scale = tl.broadcast_to(scale, exact.shape)
    quotient = exact * inverse
    return tl.fma(tl.fma(-quotient, scale, exact), inverse, quotient)


@triton.jit
def _nearest_codes(multiple: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, ties to even, for magnitudes below 128; 0 if the row's scale is nan.

    The code is the low byte of a sum whose ulp is 1, since a conversion takes four times as long as an addition.
    """
    bits = (multiple + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2 ** 23
    return tl.where(scale == scale, bits, 0).to(tl.int8)


@triton.jit
def _noise(bits: tl.tensor) -> tl.tensor:
    """Return one of 2 ** 16 evenly spaced midpoints of (-0.5, 0.5), selected by the low 16 bits.

    Adding it and rounding to nearest is stochastic rounding without a slow ``floor``.
    """
    return ((bits & 0xFFFF) << 7 | 0x3F800040).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def _to_nearest(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round to nearest, ties to even; explicitly for bfloat16, which Triton's interpreter would truncate."""
    if dtype != tl.bfloat16:
        return values.to(dtype)
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(values == values, rounded, values).to(dtype)
