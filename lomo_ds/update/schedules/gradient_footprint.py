"""What each schedule declares for a plan: the gradient shards it keeps, and where; how often it runs a batch."""

from dataclasses import dataclass

import torch

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.update.schedules.choose import Choice
from lomo_ds.update.schedules.immediate import Immediate
from lomo_ds.update.schedules.stash import Stash
from lomo_ds.update.schedules.two_pass import TwoPass


@dataclass(frozen=True)
class Keeps:
    """Of a rank's gradient shards, those a schedule keeps beyond the moment of their arrival.

    Attributes:
        passes: forward and backward passes of a step.
        on_device: all shards lie on the device until the step ends.
        on_host: all shards lie in pinned host memory until the step ends.
        in_flight: the most bytes on their way there, on the device; a tensor that is larger goes by itself.
        group: the shards of a clipping group lie on the device until it is complete.
        itemsize: of a kept element; None: as it came.
        square_sums: whether a rule's kernel may add up the squares of gradients while it updates.
    """

    passes: int = 1
    on_device: bool = False
    on_host: bool = False
    in_flight: int = 0
    group: bool = False
    itemsize: int | None = None
    square_sums: bool = False

    def bytes_of(self, size: int, itemsize: int) -> int:
        """What shards of ``size`` bytes, of ``itemsize`` each, take where they are kept."""
        return size // itemsize * (self.itemsize or itemsize)


def keeps(choice: Choice, clips_groups: bool = False, stash_dtype: torch.dtype | None = None) -> Keeps:
    """What the schedule of ``choice`` keeps; see ``build_schedule``, whose arguments these are."""
    if choice.schedule == "immediate":
        return Keeps(Immediate.passes, group=clips_groups, square_sums=not clips_groups)
    if choice.schedule == "two_pass":
        return Keeps(TwoPass.passes)
    on_host = choice.stash_device == "cpu"
    itemsize = None if stash_dtype is None else stash_dtype.itemsize
    in_flight = IN_FLIGHT_BYTES if on_host else 0
    return Keeps(Stash.passes, on_device=not on_host, on_host=on_host, in_flight=in_flight, itemsize=itemsize)
