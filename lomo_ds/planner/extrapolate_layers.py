"""Extrapolates the trace of a model cut to a few decoder layers to the full model, whose layers are all identical.

Of the ``TRACED_LAYERS`` layers that ran, the second stands for all that were left out. Its events in forward and its
events in backward are repeated. Each repetition adds the bytes that one layer's forward leaves for backward.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

from lomo_ds.planner.trace_events import EventKind, StepTrace, TraceEvent
from lomo_ds.zero3.gathering import layer_of

TRACED_LAYERS = 4
REPEATED_LAYER = 1  # position of the layer whose events are repeated


def extrapolate_layers(short: StepTrace, full: StepTrace) -> StepTrace | None:
    """Return ``short``, traced with ``TRACED_LAYERS`` layers, as if all layers of ``full`` had run.

    Args:
        full: the structure of the model with all its layers, without events.

    Returns:
        None if the layers turn out not to be identical.
    """
    missing = len(full.layers) - len(short.layers)
    short_layers, full_layers = sorted(short.layers), sorted(full.layers)
    first, repeated, after = short_layers[REPEATED_LAYER - 1 : REPEATED_LAYER + 2]
    forward = _events_of_layer(short.events, EventKind.FETCH_FORWARD, repeated, after)
    backward = _events_of_layer(short.events, EventKind.FETCH_BACKWARD, repeated, first)
    events = short.events
    layer_bytes = events[forward.stop].level - events[forward.start].level
    if layer_bytes != events[backward.start].level - events[backward.stop].level:
        return None  # backward through the layer frees other bytes than forward has left

    shift = _EventShifter(short, full, missing)
    shifted = [shift(event, 0, layer_bytes) for event in events[: forward.stop]]
    for copy in range(1, missing + 1):
        shifted += [shift(event, copy, layer_bytes) for event in events[forward]]
    shifted += [shift(event, missing, layer_bytes) for event in events[forward.stop : backward.start]]
    for copy in range(missing, 0, -1):
        shifted += [shift(event, copy, layer_bytes) for event in events[backward]]
    shifted += [shift(event, 0, layer_bytes) for event in events[backward.start :]]

    checkpoint = short.checkpoints[repeated]
    outside = {
        shift.modules(index, 0, missing): size for index, size in short.checkpoints.items() if index not in short.layers
    }
    bytes_per_layer = Counter(events[forward.stop].live.sizes)
    bytes_per_layer.subtract(events[forward.start].live.sizes)
    return dataclasses.replace(
        full,
        events=shifted,
        checkpoints=dict.fromkeys(full_layers, checkpoint) | outside,
        bytes_per_layer=bytes_per_layer,
    )


def _events_of_layer(events: list[TraceEvent], kind: EventKind, layer: int, next_layer: int) -> slice:
    """Return the range from the first event of ``kind`` of a layer to that of the layer that runs next."""
    first = {event.index: position for position, event in reversed(list(enumerate(events))) if event.kind is kind}
    return slice(first[layer], first[next_layer])


class _EventShifter:
    """Moves an event of the short model to its place in the full one."""

    def __init__(self, short: StepTrace, full: StepTrace, missing: int) -> None:
        self.missing = missing
        self.parameters = _index_mapping(short.names, full.names)
        self.modules = _index_mapping(short.module_names, full.module_names)

    def __call__(self, event: TraceEvent, copy: int, layer_bytes: int) -> TraceEvent:
        """Return the event with the activations of ``copy`` more layers alive.

        Args:
            copy: number of the repetition, if the event belongs to the repeated layer; otherwise the number of
                repetitions that have left their activations.
        """
        index = event.index
        if index >= 0:
            index = (self.parameters if event.kind is EventKind.GRADIENT else self.modules)(index, copy, self.missing)
        return dataclasses.replace(
            event,
            index=index,
            peak=event.peak + copy * layer_bytes,
            level=event.level + copy * layer_bytes,
            live_at_peak=dataclasses.replace(event.live_at_peak, extrapolated_layers=copy),
            live=dataclasses.replace(event.live, extrapolated_layers=copy),
        )


def _index_mapping(short: list[str], full: list[str]) -> Callable[[int, int, int], int]:
    indices = {name: index for index, name in enumerate(full)}

    def index_in_full(index: int, copy: int, missing: int) -> int:
        name = short[index]
        layer = layer_of(name + ".")
        if layer is None:
            return indices[name]
        stack, _, number = layer.rpartition(".")
        position = int(number)
        offset = missing if position > REPEATED_LAYER else copy if position == REPEATED_LAYER else 0
        return indices[f"{stack}.{position + offset}{name[len(layer) :]}"]

    return index_in_full
