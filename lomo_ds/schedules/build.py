"""The schedule that was chosen, built."""

import torch
from torch.distributed import ProcessGroup

from lomo_ds.clipping import Clipping
from lomo_ds.rules import Rule
from lomo_ds.schedules.base import Schedule, Target
from lomo_ds.schedules.choose import Choice
from lomo_ds.schedules.immediate import Immediate
from lomo_ds.schedules.stash import HostStash, Stash
from lomo_ds.schedules.two_pass import TwoPass
from lomo_ds.stores import Store


def build_schedule(
    choice: Choice,
    targets: list[Target],
    store: Store,
    rule: Rule,
    clipping: Clipping,
    device: torch.device,
    ranks: ProcessGroup,
    stash_dtype: torch.dtype | None,
) -> Schedule:
    """The schedule of ``choice``, for gradients computed on ``device``; see ``Stash`` for ``stash_dtype``."""
    if choice.schedule == "immediate":
        return Immediate(targets, store, rule, clipping, device, ranks)
    if choice.schedule == "two_pass":
        return TwoPass(targets, store, rule, clipping, device)
    if choice.stash_device == "cpu" and device.type != "cpu":
        return HostStash(targets, store, rule, clipping, device, stash_dtype)
    return Stash(targets, store, rule, clipping, device, stash_dtype)
