"""The picture and the Chrome trace of a timeline."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lomo_ds.simulate import Lane, find_stalls, seconds_by_cause
from lomo_ds.simulate.chrome_trace import BUSY, STALL, chrome_trace
from lomo_ds.simulate.figure import MIN_SHARE, covered_share, draw_timeline
from tests.simulate.handmade import copies_and_kernels

TIMELINE = copies_and_kernels()
LANES = [Lane.COMPUTE, Lane.LINK_UP, Lane.WIRE, Lane.HOST]


def trace_events(category: str) -> list[dict[str, Any]]:
    """Return the events of the handmade timeline, as a viewer reads them."""
    events = json.loads(json.dumps(chrome_trace(TIMELINE, "handmade")))["traceEvents"]
    return [event for event in events if event.get("cat") == category]


def thread_names() -> dict[int, str]:
    events = chrome_trace(TIMELINE, "handmade")["traceEvents"]
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_each_lane_that_is_used_is_a_thread() -> None:
    assert list(thread_names().values()) == [lane.value for lane in LANES]


@pytest.mark.parametrize("lane", LANES, ids=lambda lane: lane.value)
def test_durations_of_a_trace_sum_to_the_busy_seconds_and_to_the_stalls(lane: Lane) -> None:
    thread = LANES.index(lane)
    busy = sum(event["dur"] for event in trace_events(BUSY) if event["tid"] == thread)
    assert busy == pytest.approx(1e6 * TIMELINE.busy(lane))
    stalled = sum(event["dur"] for event in trace_events(STALL) if event["tid"] == thread)
    assert stalled == pytest.approx(1e6 * sum(stall.seconds for stall in find_stalls(TIMELINE, lane)))
    assert busy + stalled == pytest.approx(1e6 * TIMELINE.seconds)


@pytest.mark.parametrize("thread", range(len(LANES)))
def test_events_of_a_thread_do_not_overlap(thread: int) -> None:
    events = [event for event in [*trace_events(BUSY), *trace_events(STALL)] if event["tid"] == thread]
    events.sort(key=lambda event: event["ts"])
    for earlier, later in pairwise(events):
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 0.01


def test_events_say_what_they_do_and_what_they_wait_for() -> None:
    kernel = next(event for event in trace_events(BUSY) if event["name"] == "mm")
    assert kernel["args"] == {"source": "", "stream": "compute", "bytes": 0, "flops": 100}
    assert kernel["ph"] == "X"
    stall = next(event for event in trace_events(STALL) if event["tid"] == LANES.index(Lane.COMPUTE))
    assert (stall["name"], stall["args"]["waits for"]) == ("mm waits for copy up", "link up")


def test_stalls_sum_by_what_they_wait_for() -> None:
    seconds = seconds_by_cause(find_stalls(TIMELINE, Lane.COMPUTE))
    assert seconds == {"link up": pytest.approx(5, abs=0.01), "the end of the step": pytest.approx(2, abs=0.01)}


def test_the_busiest_lane_is_that_which_works_longest() -> None:
    assert TIMELINE.busiest_lane is Lane.LINK_UP


def test_short_intervals_cover_their_share_of_a_bin() -> None:
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    assert covered_share([(0.25, 0.5), (0.75, 2.0)], edges) == pytest.approx([0.5, 1.0, 0.0])
    assert covered_share([], edges) == pytest.approx([0.0, 0.0, 0.0])


def test_a_picture_shows_lanes_and_stalls(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = draw_timeline(TIMELINE, "handmade")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [lane.value for lane in LANES]
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"compute outside backward", "waits for link up", "waits for the end of the step"}
    assert 0 < seconds_by_cause(find_stalls(TIMELINE, Lane.LINK_UP))["host"] < MIN_SHARE * TIMELINE.seconds
    assert "longest stalls of link up" in axes.get_xlabel()
    figure.savefig(tmp_path / "timeline.png")
    assert is_drawn(tmp_path / "timeline.png")


def is_drawn(picture: Path) -> bool:
    """Return whether a picture has several colours."""
    from matplotlib.image import imread

    return len(np.unique(imread(picture).reshape(-1, 4), axis=0)) > 4
