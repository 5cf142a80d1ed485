"""The rehearsal of a deep model from that of a shallow one: layers alike leave alike, one after another.

Of ``FEWEST`` layers the second stands for all that were left out. Its stretch of forward, and its stretch of backward,
are repeated; each repetition lies higher by what a layer leaves between the two.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

from lomo_ds.planner.moments import Event, Moment, Rehearsal
from lomo_ds.zero3.gathering import layer_of

FEWEST = 4
PATTERN = 1  # the layer that is repeated


def stretch(short: Rehearsal, whole: Rehearsal) -> Rehearsal | None:
    """``short``, run with ``FEWEST`` layers, as if all layers of ``whole`` had been run; None if they are not alike.

    Args:
        whole: the structure of the model with all its layers, without moments.
    """
    missing = len(whole.layers) - len(short.layers)
    ours, theirs = sorted(short.layers), sorted(whole.layers)
    forward = _stretch_of(short.moments, Event.FETCH_FORWARD, ours[PATTERN], ours[PATTERN + 1])
    backward = _stretch_of(short.moments, Event.FETCH_BACKWARD, ours[PATTERN], ours[PATTERN - 1])
    moments = short.moments
    step = moments[forward.stop].level - moments[forward.start].level
    if step != moments[backward.start].level - moments[backward.stop].level:
        return None  # a layer frees something else than it has left

    place = _Places(short, whole, missing)
    found = [place(moment, 0, step) for moment in moments[: forward.stop]]
    for copy in range(1, missing + 1):
        found += [place(moment, copy, step) for moment in moments[forward]]
    found += [place(moment, missing, step) for moment in moments[forward.stop : backward.start]]
    for copy in range(missing, 0, -1):
        found += [place(moment, copy, step) for moment in moments[backward]]
    found += [place(moment, 0, step) for moment in moments[backward.start :]]

    in_forward = moments[forward.stop].flops - moments[forward.start].flops
    in_backward = moments[backward.stop].flops - moments[backward.start].flops
    checkpoint = short.checkpoints[ours[PATTERN]]
    left = Counter(moments[forward.stop].alive_level.sizes)
    left.subtract(moments[forward.start].alive_level.sizes)
    return dataclasses.replace(
        whole,
        moments=found,
        checkpoints=dict.fromkeys(theirs, checkpoint),
        flops=short.flops + missing * (in_forward + in_backward),
        forward_flops=short.forward_flops + missing * in_forward,
        left_by_layer=left,
    )


def _stretch_of(moments: list[Moment], event: Event, first: int, next_one: int) -> slice:
    """From the first such event of a layer to the first of the next."""
    starts = {moment.index: at for at, moment in reversed(list(enumerate(moments))) if moment.event is event}
    return slice(starts[first], starts[next_one])


class _Places:
    """Moves a moment of the shallow model to its place in the deep one."""

    def __init__(self, short: Rehearsal, whole: Rehearsal, missing: int) -> None:
        self.missing = missing
        self.parameters = _renamer(short.names, whole.names)
        self.modules = _renamer(short.module_names, whole.module_names)

    def __call__(self, moment: Moment, copy: int, step: int) -> Moment:
        """A moment of the pattern's repetition ``copy``, or of what lies behind it: ``copy`` times ``step`` higher."""
        index = moment.index
        if index >= 0:
            index = (self.parameters if moment.event is Event.GRADIENT else self.modules)(index, copy, self.missing)
        return dataclasses.replace(
            moment,
            index=index,
            peak=moment.peak + copy * step,
            level=moment.level + copy * step,
            alive=dataclasses.replace(moment.alive, more_layers=copy),
            alive_level=dataclasses.replace(moment.alive_level, more_layers=copy),
        )


def _renamer(short: list[str], whole: list[str]) -> Callable[[int, int, int], int]:
    number = {name: index for index, name in enumerate(whole)}

    def find(index: int, copy: int, missing: int) -> int:
        name = short[index]
        layer = layer_of(name + ".")
        if layer is None:
            return number[name]
        stack, _, position = layer.rpartition(".")
        later = missing if int(position) > PATTERN else copy if int(position) == PATTERN else 0
        return number[f"{stack}.{int(position) + later}{name[len(layer) :]}"]

    return find
