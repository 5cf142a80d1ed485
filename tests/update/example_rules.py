"""Small rules for tests: each asks for something of the updater that no rule of lomo_ds asks for yet."""

from collections.abc import Callable

import torch
from torch import Tensor

from lomo_ds.numerics.apply import Update, apply
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.values import part_of, read
from lomo_ds.update.rules import Gradient, Rule, Sgd, State, StateSpec, SumsOverRanks
from lomo_ds.update.target import Target

MOMENTUM = 0.9
PROJECTED_COLUMNS = 3
SMALLEST_NORM = 1e-30


class Momentum(Rule):
    """SGD with momentum, whose sharded state is fp32: m <- 0.9 m + g; p <- (1 - lr weight_decay) p - lr m."""

    dtype = torch.float32
    bytes_per_element = 4

    def state(self, target: Target) -> dict[str, StateSpec]:
        return {"momentum": StateSpec(target.shape, sharded=True, dtype=self.dtype)}

    def update(self, target: Target, weight: Values, gradient: Gradient, state: State, step: int) -> Update:
        momentum = state["momentum"]
        apply([(momentum, Update(gradient.read, factor=-1.0, decay=MOMENTUM))], None)
        return Update(
            lambda start, stop: read(part_of(momentum, start, stop)).clone(),
            factor=target.options["lr"],
            decay=1 - target.options["lr"] * target.options["weight_decay"],
        )


class EightBitMomentum(Momentum):
    """``Momentum`` in eight-bit blocks, rounded to nearest."""

    dtype = torch.int8


def projection_of(shape: torch.Size) -> Tensor | None:
    """Return orthonormal columns to project the rows of a matrix on; None for what is not projected."""
    if len(shape) < 2 or shape[-1] <= PROJECTED_COLUMNS:
        return None
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.linalg.qr(torch.randn(shape[-1], PROJECTED_COLUMNS, generator=generator)).Q


class ProjectedSgd(Sgd):
    """SGD in a subspace that is equal on all ranks: p <- (1 - lr weight_decay) p - lr g V V^T; vectors as ``Sgd``."""

    follows_gradient = False
    bytes_per_element = 8

    def project(self, target: Target, gradient: Tensor, state: State, step: int) -> Tensor | None:
        projection = projection_of(target.shape)
        return None if projection is None else gradient @ projection.to(gradient.dtype)

    def update(self, target: Target, weight: Values, gradient: Gradient, state: State, step: int) -> Update:
        projection = projection_of(target.shape)
        if projection is None:
            return super().update(target, weight, gradient, state, step)
        return Update(
            direction_in_rows(target, gradient, projection),
            factor=target.options["lr"],
            decay=1 - target.options["lr"] * target.options["weight_decay"],
        )


def direction_in_rows(target: Target, gradient: Gradient, projection: Tensor) -> Callable[[int, int], Tensor]:
    """Return the function that computes a piece of this rank's slice from the rows of the projected gradient."""
    columns, width = projection.shape
    first_row = target.start // columns

    def direction(start: int, stop: int) -> Tensor:
        start, stop = target.start + start, target.start + stop
        first, last = start // columns, ceil_div(stop, columns)
        rows = gradient.read((first - first_row) * width, (last - first_row) * width).view(-1, width)
        return (rows @ projection.T).flatten()[start - first * columns : stop - first * columns].clone()

    return direction


class SpectralDescent(Rule):
    """Normalized by the spectral norm: p <- (1 - lr weight_decay) p - lr g / |g|; vectors by their norm.

    Each rank needs the whole gradient: it puts its slice into zeros, and the sum over the ranks is the gradient.
    """

    sums_over_ranks = 1

    def update(self, target: Target, weight: Values, gradient: Gradient, state: State, step: int) -> SumsOverRanks:
        own = gradient.read(0, target.numel)
        whole = yield torch.nn.functional.pad(own, (target.start, target.full_numel - target.stop))
        return Update(
            own,
            factor=target.options["lr"] / spectral_norm(whole.view(target.shape)).clamp(min=SMALLEST_NORM),
            decay=1 - target.options["lr"] * target.options["weight_decay"],
        )


def spectral_norm(gradient: Tensor) -> Tensor:
    """Return the largest singular value of a matrix, or the norm of a vector; 0-dim."""
    return torch.linalg.matrix_norm(gradient, 2) if gradient.dim() == 2 else torch.linalg.vector_norm(gradient)
