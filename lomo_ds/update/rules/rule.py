"""Base class of the update rules: they turn a gradient shard into an ``Update``, and know no formats and schedules."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.numerics.apply import PieceOfDirection, Scalar, Update
from lomo_ds.numerics.flat import clamp_
from lomo_ds.numerics.int8 import Values
from lomo_ds.update.target import Target

# Each yield is a 1-D fp32 tensor of this rank, and receives the sum of that tensor over all ranks
SumsOverRanks = Generator[Tensor, Tensor, Update]


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a rule keeps for a parameter from step to step; it starts as zeros.

    Attributes:
        shape: of the full tensor.
        sharded: whether each rank keeps its slice, the same as of the parameter (``shape`` has as many elements), as a
            1-D tensor. Otherwise each rank keeps the full tensor, and all ranks compute the same values.
        dtype: int8 stores a sharded tensor as eight-bit blocks.
    """

    shape: torch.Size
    sharded: bool = False
    dtype: torch.dtype = torch.float32


State = Mapping[str, Values]  # a parameter's state on the compute device, by the names of its specs


@dataclass(frozen=True)
class Gradient:
    """This rank's slice of a gradient, as it arrives.

    Attributes:
        values: 1-D, any float dtype; the rule may overwrite them. Or a function that computes a piece of them.
        scale: factor that averages, unscales and clips.
        limit: magnitude that elements are clamped to before scaling; None does not clamp.
    """

    values: Tensor | PieceOfDirection
    scale: Scalar = 1.0
    limit: float | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the slice, clamped and scaled, as a new fp32 tensor."""
        part = self.values[start:stop] if isinstance(self.values, Tensor) else self.values(start, stop)
        if self.limit is not None:
            part = part.clone()
            clamp_(part, self.limit)
        exact = part.to(torch.float32, copy=True)
        return exact.mul_(self.scale.to(exact.device, torch.float32) if isinstance(self.scale, Tensor) else self.scale)


class Rule(ABC):
    """Decides how a parameter moves along its gradient.

    Attributes:
        follows_gradient: whether every direction is the gradient, so that applying it can also sum its squares.
        sums_over_ranks: the most sums that an update asks for, one after the other.
        bytes_per_element: temporaries that an update allocates for each element of a piece, beside those of
            ``numerics.apply``.
    """

    follows_gradient = False
    sums_over_ranks = 0
    bytes_per_element = 0

    def state(self, target: Target) -> dict[str, StateSpec]:
        """Return the specs of the state of a parameter, by name; by default none."""
        return {}

    def project(self, target: Target, gradient: Tensor, state: State, step: int) -> Tensor | None:
        """Project this rank's gradient before it is summed over the ranks; by default None, which sums it as it is.

        The projection must be linear and equal on all ranks. A rank receives the rows of the projection that its slice
        of the parameter has a part of, so two ranks may receive the same row.

        Args:
            gradient: of the full parameter, before averaging, unscaling and clipping.

        Returns:
            A tensor with a row for each row of the parameter (all dimensions but the last).
        """
        return None

    @abstractmethod
    def update(
        self, target: Target, weight: Values, gradient: Gradient, state: State, step: int
    ) -> Update | SumsOverRanks:
        """Return the update of this rank's slice of a parameter, or a generator that returns it.

        The learning rate and the weight decay are in ``target.options``. Nothing may make the host wait for the device.

        Args:
            weight: this rank's slice, to be read only.
            gradient: this rank's slice of the sum over ranks, or the rows that it receives of the projection.
            state: to be changed in place; equal on all ranks where it is not sharded.
            step: number of this step, from 1; skipped steps do not count.
        """
