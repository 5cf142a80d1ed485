"""Timelines in the trace event format that chrome://tracing and Perfetto show."""

from collections.abc import Iterator
from typing import Any

from lomo_ds.simulate.program import HOST, Work
from lomo_ds.simulate.stalls import Stall, find_stalls
from lomo_ds.simulate.timeline import Lane, Span, Timeline

BUSY, STALL = "busy", "stall"  # categories of events


def chrome_trace(timeline: Timeline, title: str) -> dict[str, Any]:
    """Return a trace with a thread for each lane, in which the lane either works or stalls."""
    events = [_metadata("process_name", 0, name=title)]
    for thread, lane in enumerate(timeline.used_lanes):
        busy = _host_work(timeline) if lane is Lane.HOST else _lane_work(timeline, lane)
        events += [
            _metadata("thread_name", thread, name=lane.value),
            _metadata("thread_sort_index", thread, sort_index=thread),
            *({**event, "tid": thread} for event in busy),
            *({**_stall(stall), "tid": thread} for stall in find_stalls(timeline, lane)),
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _metadata(kind: str, thread: int, **values: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": thread, "args": values}


def _event(name: str, category: str, start: float, end: float, **values: Any) -> dict[str, Any]:
    """Return a complete event; the format counts in microseconds."""
    times = {"ts": round(start * 1e6, 3), "dur": round((end - start) * 1e6, 3)}
    return {"name": name, "cat": category, "ph": "X", "pid": 0, **times, "args": values}


def _lane_work(timeline: Timeline, lane: Lane) -> Iterator[dict[str, Any]]:
    for span in timeline.spans_of(lane):
        operation = timeline.program.operations[span.operation]
        assert operation.work is not None
        values = {"source": operation.source, "stream": timeline.program.streams[operation.stream]}
        yield _event(operation.name, BUSY, span.start, span.end, **values, **_amounts(operation.work))


def _amounts(work: Work) -> dict[str, int]:
    moved = work.memory + work.up + work.down + work.sent + work.disk
    return {"bytes": moved, "flops": work.flops} if work.flops else {"bytes": moved}


def _host_work(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Yield the times in which the host gives out operations; after the last it goes on to the next step."""
    free_since = 0.0
    for span in timeline.spans:
        operation = timeline.program.operations[span.operation]
        if operation.stream != HOST:
            yield _event(f"launch {operation.name}", BUSY, free_since, span.issued, source=operation.source)
        free_since = _given_out(span, operation.stream)
    if timeline.seconds > free_since:
        yield _event("go on to the next step", BUSY, free_since, timeline.seconds)


def _given_out(span: Span, stream: int) -> float:
    """Return when the host is done with an operation: when it has given it out, or has waited."""
    return span.end if stream == HOST else span.issued


def _stall(stall: Stall) -> dict[str, Any]:
    awaited = {} if stall.cause is None else {"waits for": stall.cause.value}
    return _event(stall.reason, STALL, stall.start, stall.end, source=stall.source, **awaited)
