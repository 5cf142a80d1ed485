"""Stalls: the times at which a lane has nothing to do, and why."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lomo_ds.simulate.timeline import Lane, Span, Timeline

SHORTEST = 1e-6  # seconds; shorter gaps are not reported


@dataclass(frozen=True)
class Stall:
    """A lane without work.

    Attributes:
        start, end: in seconds.
        reason: what it waits for, in words.
        source: file and line of the code that makes it wait.
        cause: the lane that it waits for; None if nothing is left to do.
    """

    lane: Lane
    start: float
    end: float
    reason: str
    source: str
    cause: Lane | None

    @property
    def seconds(self) -> float:
        """Length of the stall."""
        return self.end - self.start


@dataclass(frozen=True)
class StallSum:
    """All stalls of a lane that one line of code causes for one reason."""

    lane: Lane
    reason: str
    source: str
    seconds: float
    count: int

    def __str__(self) -> str:
        """Describe the stalls in one line."""
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"{self.seconds:.3g} s, {times}: {self.reason}, {self.source}"


def cause_name(cause: Lane | None) -> str:
    """Return the name of what a stall waits for."""
    return "the end of the step" if cause is None else cause.value


def find_stalls(timeline: Timeline, lane: Lane) -> list[Stall]:
    """Return the stalls of a lane, except of one that is never used; those of the host are its waits."""
    spans = timeline.spans_of(lane)
    if lane is Lane.HOST:
        return [_host_stall(timeline, span) for span in spans if span.end - span.start > SHORTEST]
    stalls = []
    idle_since = 0.0
    for span in spans:
        if span.start - idle_since > SHORTEST:
            stalls.append(Stall(lane, idle_since, span.start, *_cause(timeline, span, idle_since)))
        idle_since = span.end
    if spans and timeline.seconds - idle_since > SHORTEST:
        stalls.append(Stall(lane, idle_since, timeline.seconds, "has nothing left to do", _last_source(timeline), None))
    return stalls


def longest_stalls(timeline: Timeline, lane: Lane, count: int = 3) -> list[StallSum]:
    """Return the lines of code that cost a lane most time, the worst first."""
    seconds_by_line: dict[tuple[str, str], list[float]] = defaultdict(list)
    for stall in find_stalls(timeline, lane):
        seconds_by_line[stall.reason, stall.source].append(stall.seconds)
    sums = [StallSum(lane, *line, sum(seconds), len(seconds)) for line, seconds in seconds_by_line.items()]
    return sorted(sums, key=lambda stall: -stall.seconds)[:count]


def seconds_by_cause(stalls: Iterable[Stall]) -> dict[str, float]:
    """Return how long stalls last together, by the name of what they wait for, the worst first."""
    seconds: dict[str, float] = defaultdict(float)
    for stall in stalls:
        seconds[cause_name(stall.cause)] += stall.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _cause(timeline: Timeline, span: Span, idle_since: float) -> tuple[str, str, Lane]:
    """Return why an operation did not begin as soon as its lane was free, the line and the lane that cause it."""
    operations = timeline.program.operations
    operation = operations[span.operation]
    if span.start > span.ready and span.ready <= idle_since:
        other = next((lane for lane in span.lanes if lane is not Lane.WIRE), Lane.WIRE)
        return f"{operation.name} needs the {other.value} too", operation.source, other
    if span.awaited is None or span.issued >= span.ready:
        return *_host_cause(timeline, span, idle_since), Lane.HOST
    awaited = operations[span.awaited]
    source = next((wait.source for wait in operation.waits if wait.operation == span.awaited), operation.source)
    return f"{operation.name} waits for {awaited.name}", source, timeline.spans[span.awaited].lanes[0]


def _host_cause(timeline: Timeline, span: Span, idle_since: float) -> tuple[str, str]:
    """Return what kept the host from giving out an operation sooner: its longest wait meanwhile, or its own work."""

    def seconds(wait: Span) -> float:
        return wait.end - max(wait.start, idle_since)

    longest = max(_host_waits_before(timeline, span, idle_since), key=seconds, default=None)
    if longest is not None and seconds(longest) > (span.issued - idle_since) / 2:
        operation = timeline.program.operations[longest.operation]
        return f"the host waits in {operation.name}", operation.source
    return "the host is late", timeline.program.operations[span.operation].source


def _host_waits_before(timeline: Timeline, span: Span, since: float) -> Iterator[Span]:
    """Yield the waits of the host that ended after ``since`` and before it gave out the operation of ``span``."""
    for number in reversed(range(span.operation)):
        earlier = timeline.spans[number]
        is_wait = Lane.HOST in earlier.lanes
        if max(earlier.issued, earlier.end if is_wait else 0.0) <= since:
            return
        if is_wait:
            yield earlier


def _host_stall(timeline: Timeline, span: Span) -> Stall:
    operation = timeline.program.operations[span.operation]
    awaited, cause = "", None
    if span.awaited is not None:
        awaited = f" for {timeline.program.operations[span.awaited].name}"
        cause = timeline.spans[span.awaited].lanes[0]
    return Stall(Lane.HOST, span.start, span.end, f"{operation.name}{awaited}", operation.source, cause)


def _last_source(timeline: Timeline) -> str:
    last = max(timeline.spans, key=lambda span: (span.end, span.operation))
    return timeline.program.operations[last.operation].source
