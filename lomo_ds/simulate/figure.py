"""Draws a timeline: when each lane works, what it waits for, and the lines of code that make it wait."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lomo_ds.simulate.stalls import Stall, StallSum, cause_name, find_stalls, longest_stalls
from lomo_ds.simulate.timeline import Lane, Timeline

BINS = 1600  # of the time axis; shorter spans are drawn as their share of a bin
MIN_SHARE = 0.001  # of a step; what takes less is not drawn
ROW = 0.8  # height of a lane; the rest separates it from the next
FORWARD = "#9dc3e6"
BUSY_COLOURS = {
    Lane.COMPUTE: "#3a76af",
    Lane.LINK_UP: "#55a868",
    Lane.LINK_DOWN: "#98cf9f",
    Lane.WIRE: "#8172b3",
    Lane.DISK: "#937860",
    Lane.HOST: "#8c8c8c",
}
STALL_COLOURS = {
    Lane.HOST: "#d62728",
    Lane.LINK_UP: "#ff9f1c",
    Lane.LINK_DOWN: "#ffd54f",
    Lane.WIRE: "#e377c2",
    Lane.COMPUTE: "#17becf",
    Lane.DISK: "#8d4a1f",
    None: "#e6e6e6",
}
Interval = tuple[float, float]
Layer = tuple[str, str, list[Interval]]  # label in the legend, if any; colour; and intervals


def draw_timeline(timeline: Timeline, title: str) -> Any:
    """Return a matplotlib figure.

    Each lane is a row, whose height is filled by what the lane does. The stalls of compute and of the busiest lane
    are coloured by what they wait for; the gaps of the other lanes cost no time by themselves and stay empty.
    """
    from matplotlib.figure import Figure

    lanes, busiest = _visible_lanes(timeline), timeline.busiest_lane
    worst = longest_stalls(timeline, busiest)
    figure = Figure(figsize=(12, 2.4 + 0.62 * len(lanes) + 0.2 * len(worst)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = figure.add_subplot()
    edges = np.linspace(0.0, timeline.seconds, BINS + 1)
    for row, lane in enumerate(lanes):
        layers = _busy_layers(timeline, lane)
        if lane in (Lane.COMPUTE, busiest):
            layers += _stall_layers(find_stalls(timeline, lane), MIN_SHARE * timeline.seconds)
        _draw_lane(axes, -row - ROW, edges, layers)
    _label(axes, timeline)
    axes.set_xlabel("\n".join(["seconds", "", *_notes(timeline, worst)]), loc="left", family="monospace", fontsize=9)
    return figure


def _visible_lanes(timeline: Timeline) -> list[Lane]:
    """Return the lanes that do enough to be seen."""
    return [lane for lane in timeline.used_lanes if timeline.busy_share(lane) >= MIN_SHARE or lane is Lane.COMPUTE]


def covered_share(intervals: Iterable[Interval], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each bin that is covered by intervals, which are in order and do not overlap."""
    times = np.fromiter(chain((0.0, 0.0), *intervals), dtype=np.float64)
    lengths = times[1::2] - times[::2]
    covered = np.cumsum(np.stack([np.zeros_like(lengths), lengths], axis=1).ravel())  # until each start and each end
    shares: NDArray[np.float64] = np.diff(np.interp(edges, times, covered)) / np.diff(edges)
    return shares


def _busy_layers(timeline: Timeline, lane: Lane) -> list[Layer]:
    spans = timeline.spans_of(lane)
    if lane is Lane.HOST:
        return [("", BUSY_COLOURS[lane], _gaps([(span.start, span.end) for span in spans], timeline.seconds))]
    if lane is not Lane.COMPUTE:
        return [("", BUSY_COLOURS[lane], [(span.start, span.end) for span in spans])]
    intervals: tuple[list[Interval], list[Interval]] = ([], [])
    for span in spans:
        intervals[timeline.program.operations[span.operation].in_backward].append((span.start, span.end))
    return [
        ("compute outside backward", FORWARD, intervals[0]),
        ("compute in backward", BUSY_COLOURS[lane], intervals[1]),
    ]


def _gaps(intervals: list[Interval], end: float) -> list[Interval]:
    times = [0.0, *chain.from_iterable(intervals), end]
    return list(zip(times[::2], times[1::2], strict=True))


def _stall_layers(stalls: list[Stall], shortest: float) -> list[Layer]:
    """Return a layer for each cause that costs at least ``shortest`` seconds."""
    layers = []
    for cause, colour in STALL_COLOURS.items():
        own = [stall for stall in stalls if stall.cause is cause]
        if sum(stall.seconds for stall in own) >= shortest:
            layers.append((f"waits for {cause_name(cause)}", colour, [(stall.start, stall.end) for stall in own]))
    return layers


def _draw_lane(axes: Any, bottom: float, edges: NDArray[np.float64], layers: list[Layer]) -> None:
    """Stack layers, each as high as its share of a bin."""
    base = np.full(len(edges) - 1, bottom)
    for label, colour, intervals in layers:
        if intervals:
            top = base + ROW * covered_share(intervals, edges)
            axes.stairs(top, edges, baseline=base, fill=True, color=colour, label=label, linewidth=0, antialiased=False)
            base = top


def _label(axes: Any, timeline: Timeline) -> None:
    lanes = _visible_lanes(timeline)
    middles = [-row - ROW / 2 for row in range(len(lanes))]
    axes.set_yticks(middles, [lane.value for lane in lanes], fontsize=10)
    for lane, middle in zip(lanes, middles, strict=True):
        text = f"{100 * timeline.busy_share(lane):.1f} %"
        axes.text(1.01, middle, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)
    axes.text(1.01, 0.08, "busy", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    axes.set(xlim=(0.0, timeline.seconds), ylim=(-len(lanes), 0.1))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, frameon=False, fontsize=9
    )


def _notes(timeline: Timeline, worst: list[StallSum]) -> list[str]:
    if not worst:
        return []
    name = timeline.busiest_lane.value
    return [f"longest stalls of {name}:", *map(str, worst)]
