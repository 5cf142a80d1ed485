"""Gradient memory of each schedule, for the planner: which shards are kept, and where; passes per batch."""

from dataclasses import dataclass

import torch

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.update.schedules.choose import Choice
from lomo_ds.update.schedules.immediate import Immediate
from lomo_ds.update.schedules.stash import Stash
from lomo_ds.update.schedules.two_pass import TwoPass


@dataclass(frozen=True)
class GradientFootprint:
    """Gradient shards that a schedule keeps on a rank after they arrive.

    Attributes:
        passes: forward and backward passes of a step.
        on_device: whether all shards stay on the device until the step ends.
        on_host: whether all shards stay in pinned host memory until the step ends.
        in_flight: maximum bytes on the device that are being copied to the host; a larger tensor is copied alone.
        group: whether the shards of a clipping group stay on the device until the group is complete.
        itemsize: bytes of a kept element; None keeps the gradient's own dtype.
        square_sums: whether a rule's kernel may compute sums of squares of the gradients during the update.
    """

    passes: int = 1
    on_device: bool = False
    on_host: bool = False
    in_flight: int = 0
    group: bool = False
    itemsize: int | None = None
    square_sums: bool = False

    def bytes_of(self, size: int, itemsize: int) -> int:
        """Return the bytes that kept shards take, given their ``size`` and ``itemsize`` on arrival, in bytes."""
        return size // itemsize * (self.itemsize or itemsize)


def gradient_footprint(
    choice: Choice, clips_groups: bool = False, stash_dtype: torch.dtype | None = None
) -> GradientFootprint:
    """Return the gradient footprint of the schedule that ``choice`` selects; see ``Stash`` for ``stash_dtype``."""
    if choice.schedule == "immediate":
        return GradientFootprint(Immediate.passes, group=clips_groups, square_sums=not clips_groups)
    if choice.schedule == "two_pass":
        return GradientFootprint(TwoPass.passes)
    on_host = choice.stash_device == "cpu"
    itemsize = None if stash_dtype is None else stash_dtype.itemsize
    in_flight = IN_FLIGHT_BYTES if on_host else 0
    return GradientFootprint(
        Stash.passes, on_device=not on_host, on_host=on_host, in_flight=in_flight, itemsize=itemsize
    )
