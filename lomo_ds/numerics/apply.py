"""Application of updates to weights: p <- decay p - factor scale direction, for every storage format.

Floats are updated by a Triton kernel on a GPU (``float_kernel``) or by PyTorch operations (``float_eager``), eight-bit
weights by ``int8.update``. All arithmetic is in fp32, and each result is rounded once.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from lomo_ds.numerics import flat, int8
from lomo_ds.numerics.flat import clamp_, pieces
from lomo_ds.numerics.float_eager import update_half, update_single
from lomo_ds.numerics.int8 import Blocks, Values
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.numerics.values import device_of, numel_of, part_of, piece_numel

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")

Scalar = float | Tensor  # a tensor is 0-dim, and the host does not wait for it
# returns elements [start, stop) of a direction as a new fp32 tensor, so that no more than a piece of it exists
PieceOfDirection = Callable[[int, int], Tensor]
# update_half with stochastic rounding: fp32 values, their bits with noise added, the noise, and the result
HALF_BYTES_PER_ELEMENT = 4 + 4 + 2 + 2


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one shard, as a rule decides it: p <- decay p - factor scale direction.

    Attributes:
        direction: 1-D, as long as the shard, any float dtype, overwritten; or a function of a piece of it.
        factor: step length, learning rate included.
        decay: factor of the old weight.
        scale: what a direction that is a gradient must still be multiplied with.
        limit: magnitude that the direction's elements are clamped to before scaling; None does not clamp.
    """

    direction: Tensor | PieceOfDirection
    factor: Scalar
    decay: Scalar = 1.0
    scale: Scalar = 1.0
    limit: float | None = None


def apply(
    updates: Sequence[tuple[Values, Update]], noise: RoundingNoise | None, squares: SquareSums | None = None
) -> None:
    """Apply updates to shards in place, without making the host wait for the device.

    Args:
        updates: shards on the compute device, each with its update.
        noise: for stochastic rounding of half-precision and eight-bit weights; None rounds to nearest.
        squares: from ``allocate_square_sums``; receives the sums of squares of the directions before clamping, which
            are tensors then, with floats as scalars.
    """
    whole: list[tuple[Values, Tensor, Update]] = []
    for values, update in updates:
        if isinstance(update.direction, Tensor):
            whole.append((values, update.direction, update))
        else:
            _apply_in_pieces(values, update, update.direction, noise)
    for alike in _group(whole, lambda entry: _scalars_key(entry[2])):
        _apply_alike([(values, direction) for values, direction, _ in alike], alike[0][2], noise, squares)


def allocate_square_sums(numels: Sequence[int], device: torch.device) -> SquareSums | None:
    """Allocate the sums of squares of a step; None if no kernel computes them on this device.

    Args:
        numels: elements of each direction of a step.
    """
    return None if kernel_for(device) is None else SquareSums(numels, device)


def temporary_bytes(numel: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the bytes that applying a direction of ``numel`` elements allocates; a kernel allocates none.

    Args:
        dtype: of the weights.
        device_type: ``gpu`` or ``cpu``.
    """
    if dtype == torch.float32 or device_type != "cpu":
        return 0
    return HALF_BYTES_PER_ELEMENT * min(numel, flat.CPU_PIECE_NUMEL)


def _apply_in_pieces(values: Values, update: Update, direction: PieceOfDirection, noise: RoundingNoise | None) -> None:
    """Apply an update whose direction is computed a piece at a time."""
    numel, step = numel_of(values), piece_numel(device_of(values))
    for piece, start in enumerate(range(0, numel, step)):
        stop = min(start + step, numel)
        _apply_alike([(part_of(values, start, stop), direction(start, stop))], update, noise, None, piece)


def _apply_alike(
    pairs: Sequence[tuple[Values, Tensor]],
    update: Update,
    noise: RoundingNoise | None,
    squares: SquareSums | None,
    piece: int = 0,
) -> None:
    """Apply updates that have the scalars of ``update``."""
    blocks = [(values, direction) for values, direction in pairs if isinstance(values, Blocks)]
    floats = [(values, direction) for values, direction in pairs if isinstance(values, Tensor)]
    _update_blocks(blocks, update, noise, squares, piece)
    for group in _group(floats, lambda pair: (pair[0].dtype, pair[1].dtype)):
        shards, directions = [pair[0] for pair in group], [pair[1] for pair in group]
        kernel = kernel_for(directions[0].device)
        # fp32 weights need no rounding: torch updates them all in one or two launches and reads directions once too
        if kernel is not None and (squares is not None or shards[0].dtype != torch.float32):
            _launch(kernel, shards, directions, update, noise, squares)
        else:
            assert squares is None, "sums of squares need a kernel"
            _apply_in_torch(shards, directions, update, noise)


def _update_blocks(
    pairs: Sequence[tuple[Blocks, Tensor]],
    update: Update,
    noise: RoundingNoise | None,
    squares: SquareSums | None,
    piece: int,
) -> None:
    """Update eight-bit weights, each with one call."""
    if not pairs:
        return
    factor, decay = _two_scalars(update, pairs[0][1].device)
    for values, direction in pairs:
        slots = None if squares is None else squares.take(direction.numel())
        block_noise = None if noise is None else noise.for_blocks(values.number, piece)
        int8.update(values, direction, factor, decay, block_noise, update.limit, slots)


def _launch(
    kernel: ModuleType,
    shards: list[Tensor],
    directions: list[Tensor],
    update: Update,
    noise: RoundingNoise | None,
    squares: SquareSums | None,
) -> None:
    """Update each shard with one kernel launch that reads its direction once."""
    factor, decay = _two_scalars(update, directions[0].device)
    for shard, direction in zip(shards, directions, strict=True):
        call = None if noise is None or shard.dtype == torch.float32 else noise.next_call()
        slots = None if squares is None else squares.take(direction.numel())
        kernel.update(shard, direction, factor, decay, call, update.limit, slots)


def _apply_in_torch(
    shards: list[Tensor], directions: list[Tensor], update: Update, noise: RoundingNoise | None
) -> None:
    """Update all shards together with PyTorch operations, in pieces if they need temporary copies."""
    if update.limit is not None:
        for direction in directions:
            clamp_(direction, update.limit)
    device = directions[0].device
    compute: Callable[[list[Tensor], list[Tensor]], None]
    if shards[0].dtype == torch.float32:
        scale, factor, decay = (_to_device(scalar, device) for scalar in (update.scale, update.factor, update.decay))
        compute = partial(update_single, factor=factor, decay=decay, scale=scale)
    else:
        factor, decay = _two_scalars(update, device)
        generator = None if noise is None else noise.generator
        compute = partial(update_half, factor=factor, decay=decay, generator=generator)
    copies = shards[0].dtype != torch.float32 or directions[0].dtype != torch.float32
    for shard_parts, direction_parts in pieces(shards, directions) if copies else [(shards, directions)]:
        compute(shard_parts, direction_parts)


def _two_scalars(update: Update, device: torch.device) -> tuple[Scalar, Scalar]:
    """Return ``scale * factor`` and ``decay``; tensors are fp32 and on ``device``, and a product is rounded once."""
    scale, factor = update.scale, update.factor
    if isinstance(scale, Tensor):
        product: Scalar = (scale.to(device, torch.float64, non_blocking=True) * factor).float()
    elif isinstance(factor, Tensor) and scale != 1:
        product = (factor.to(device, torch.float64, non_blocking=True) * scale).float()
    else:
        product = _to_device(factor, device) if scale == 1 else factor * scale
    return product, _to_device(update.decay, device)


def _to_device(scalar: Scalar, device: torch.device) -> Scalar:
    """Return a scalar that PyTorch operations on ``device`` can use."""
    return scalar.to(device, torch.float32, non_blocking=True) if isinstance(scalar, Tensor) else scalar


def _scalars_key(update: Update) -> tuple[object, ...]:
    """Return what updates that may be applied together have in common; tensors are compared by identity."""
    scalars = (update.factor, update.decay, update.scale)
    return (*((id(scalar),) if isinstance(scalar, Tensor) else scalar for scalar in scalars), update.limit)


def _group(entries: Iterable[Entry], key_of: Callable[[Entry], object]) -> list[list[Entry]]:
    """Group entries by a key, in the order in which keys first occur."""
    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key_of(entry), []).append(entry)
    return list(groups.values())


@functools.cache
def kernel_for(device: torch.device) -> ModuleType | None:
    """Return the module ``float_kernel`` after a trial run; None without a GPU, or, with a warning, if Triton fails."""
    if device.type != "cuda":
        return None
    try:
        from lomo_ds.numerics import float_kernel

        trial = torch.zeros(1, dtype=torch.bfloat16, device=device)
        squares = torch.empty(1, dtype=torch.float32, device=device)
        float_kernel.update(trial, trial.clone(), 1.0, 1.0, (0, 0), None, squares)
    except Exception as error:  # no Triton, no C compiler, an unsupported GPU: each raises another type
        logger.warning("weights are updated in several passes over memory, because Triton fails: %s", error)
        return None
    return float_kernel
