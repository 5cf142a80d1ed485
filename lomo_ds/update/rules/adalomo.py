"""AdaLomo (arXiv 2310.10195): Adafactor without momentum, with the update normalized per parameter.

With g the averaged gradient, t the step, beta = 1 - t^-0.8, and mean over rows or columns of a matrix:

    r <- beta r + (1 - beta) mean over columns of (g^2 + eps1)       one number for each row
    c <- beta c + (1 - beta) mean over rows of (g^2 + eps1)          one number for each column
    u = g / sqrt(r c / mean(r))                                      g / sqrt(v) for vectors, with v in the place of r c
    a = lr max(eps2, RMS(p))
    p <- (1 - a weight_decay) p - a u / max(1, RMS(u))

RMS is over the whole parameter. It equals ``transformers.optimization.Adafactor`` with ``scale_parameter=True`` and
``relative_step=False``.
"""

import torch
from torch import Tensor

from lomo_ds.numerics.apply import PieceOfDirection, Update
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.matrix_slices import matrix_blocks
from lomo_ds.numerics.values import device_of, piece_numel, squared_norm
from lomo_ds.update.rules.rule import Gradient, Rule, State, StateSpec, SumsOverRanks
from lomo_ds.update.target import Target

DECAY_RATE = -0.8
CLIP_THRESHOLD = 1.0  # of RMS(u)
EPS = (1e-30, 1e-3)  # added to squared gradients; the smallest RMS(p) that a step is proportional to


class AdaLomo(Rule):
    """AdaLomo, exact on slices: row and column sums are summed over the ranks, then the norm of the direction."""

    sums_over_ranks = 2
    bytes_per_element = 8  # a piece of the gradient in fp32, and its squares

    def state(self, target: Target) -> dict[str, StateSpec]:
        """Implement ``Rule.state``: row and column means of a matrix, which every rank keeps; a vector's squares."""
        if len(target.shape) < 2:
            return {"exp_avg_sq": StateSpec(target.shape, sharded=True)}
        return {
            "exp_avg_sq_row": StateSpec(target.shape[:-1]),
            "exp_avg_sq_col": StateSpec(target.shape[:-2] + target.shape[-1:]),
        }

    def update(self, target: Target, weight: Values, gradient: Gradient, state: State, step: int) -> SumsOverRanks:
        """Implement ``Rule.update``: one sum over ranks for a vector, two for a matrix."""
        beta = 1 - step**DECAY_RATE
        device, weight_square = device_of(weight), squared_norm(weight)
        if len(target.shape) < 2:
            direction = _vector_direction(gradient, state, beta)
            sums = yield torch.stack([weight_square, _squared_norm_of(direction, target.numel, device)])
            weight_square, direction_square = sums
        else:
            partial = _row_and_column_sums(target, gradient, device)
            sums = yield torch.cat([partial, weight_square[None]])
            weight_square = sums[-1]
            direction = _matrix_direction(target, gradient, state, beta, sums[:-1])
            (direction_square,) = yield _squared_norm_of(direction, target.numel, device)[None]
        step_length = target.options["lr"] * _rms(weight_square, target).clamp(min=EPS[1])
        weight_decay = target.options["weight_decay"]
        return Update(
            direction,
            factor=step_length / (_rms(direction_square, target) / CLIP_THRESHOLD).clamp(min=1.0),
            decay=1 - step_length * weight_decay if weight_decay else 1.0,
        )


def _vector_direction(gradient: Gradient, state: State, beta: float) -> PieceOfDirection:
    """Update the mean squares of this rank's slice of a vector, and return the direction."""
    mean_squares = state["exp_avg_sq"]
    assert isinstance(mean_squares, Tensor)
    for start, stop in _pieces(mean_squares.numel(), mean_squares.device):
        squares = gradient.read(start, stop).square_().add_(EPS[0])
        mean_squares[start:stop].mul_(beta).add_(squares, alpha=1 - beta)
    return lambda start, stop: gradient.read(start, stop).mul_(mean_squares[start:stop].rsqrt())


def _row_and_column_sums(target: Target, gradient: Gradient, device: torch.device) -> Tensor:
    """Return the sums of this rank's squared gradients over each row, then over each column; 1-D, of the full shape."""
    rows, columns, matrices = target.shape[:-1].numel(), target.shape[-1], target.shape[:-2].numel()
    sums = torch.zeros(rows + matrices * columns, dtype=torch.float32, device=device)
    row_sums, column_sums = sums[:rows], sums[rows:].view(matrices, columns)
    for start, stop in _pieces(target.numel, device):
        squares = gradient.read(start, stop).square_()
        for block in matrix_blocks(target.shape, target.start + start, target.start + stop):
            part = squares[block.start : block.stop].view(block.rows, block.columns)
            row_sums[block.row : block.row + block.rows] += part.sum(1)
            column_sums[block.matrix, block.column : block.column + block.columns] += part.sum(0)
    return sums


def _matrix_direction(target: Target, gradient: Gradient, state: State, beta: float, sums: Tensor) -> PieceOfDirection:
    """Update the row and column means of a matrix from their sums over all ranks, and return the direction."""
    row_means, column_means = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    assert isinstance(row_means, Tensor)
    assert isinstance(column_means, Tensor)
    *_, rows, columns = target.shape
    row_sums, column_sums = sums.split([row_means.numel(), column_means.numel()])
    for means, total, count in ((row_means, row_sums, columns), (column_means, column_sums, rows)):
        means.mul_(beta).add_((total / count + EPS[0]).view_as(means), alpha=1 - beta)
    row_roots = (row_means / row_means.mean(dim=-1, keepdim=True)).rsqrt_().view(-1, 1)
    column_roots = column_means.rsqrt().view(-1, columns)

    def direction(start: int, stop: int) -> Tensor:
        exact = gradient.read(start, stop)
        for block in matrix_blocks(target.shape, target.start + start, target.start + stop):
            part = exact[block.start : block.stop].view(block.rows, block.columns)
            part.mul_(row_roots[block.row : block.row + block.rows])
            part.mul_(column_roots[block.matrix, block.column : block.column + block.columns])
        return exact

    return direction


def _squared_norm_of(direction: PieceOfDirection, numel: int, device: torch.device) -> Tensor:
    """Return the squared norm of this rank's slice of a direction, 0-dim fp32."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for start, stop in _pieces(numel, device):
        exact = direction(start, stop)
        total += torch.dot(exact, exact)
    return total


def _pieces(numel: int, device: torch.device) -> list[tuple[int, int]]:
    """Return the bounds of the pieces that ``numel`` elements are computed in."""
    step = piece_numel(device)
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def _rms(squared_norm_over_ranks: Tensor, target: Target) -> Tensor:
    """Return the root mean square of a full parameter's elements."""
    return (squared_norm_over_ranks / target.full_numel).sqrt()
