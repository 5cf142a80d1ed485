"""Runs a program on a machine, with a virtual clock.

The host gives out operations one after the other. An operation begins when the host has given it out, its stream has
come to it, what it waits for has ended, and the lanes that it needs are free; of several, that which was ready first.
"""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass
from enum import Enum

from lomo_ds.simulate.machine import COLLECTIVE_SECONDS, COPY_SECONDS, Machine
from lomo_ds.simulate.program import HOST, Program, Work

NEVER = -1.0


class Lane(Enum):
    """A part of a machine that does one operation at a time."""

    COMPUTE = "compute"
    LINK_UP = "link up"
    LINK_DOWN = "link down"
    WIRE = "wire"
    DISK = "disk"
    HOST = "host"


HOST_WAITS = ((Lane.HOST,), 0.0)


@dataclass(frozen=True, slots=True)
class Span:
    """The time at which an operation ran.

    Attributes:
        operation: its number in the program.
        lanes: what it occupied.
        issued: when the host had given it out; ``ready``, when it could have begun, in seconds.
        start, end: when it ran.
        awaited: the operation that it waited for last before it was ready; None if it was ready when it was issued.
    """

    operation: int
    lanes: tuple[Lane, ...]
    issued: float
    ready: float
    start: float
    end: float
    awaited: int | None


@dataclass(frozen=True)
class Timeline:
    """A step on a machine.

    Attributes:
        spans: one for each operation of the program, by number; those of the host are its waits.
        seconds: of the whole step.
    """

    program: Program
    machine: Machine
    spans: list[Span]
    seconds: float

    def spans_of(self, lane: Lane) -> list[Span]:
        """Return the spans of a lane, in the order of their start; of the host, only those in which it waits."""
        return sorted((span for span in self.spans if lane in span.lanes), key=lambda span: span.start)

    @property
    def used_lanes(self) -> list[Lane]:
        """The lanes that do anything in the step, and the host."""
        used = {lane for span in self.spans for lane in span.lanes} | {Lane.HOST}
        return [lane for lane in Lane if lane in used]

    @property
    def busiest_lane(self) -> Lane:
        """The lane that works longest, apart from the host."""
        return max((lane for lane in Lane if lane is not Lane.HOST), key=self.busy)

    def busy(self, lane: Lane) -> float:
        """Return the seconds in which a lane works. The host works whenever it does not wait."""
        occupied = sum(span.end - span.start for span in self.spans_of(lane))
        return self.seconds - occupied if lane is Lane.HOST else occupied

    def busy_share(self, lane: Lane) -> float:
        """Return the share of the step in which a lane works."""
        return self.busy(lane) / self.seconds


def run_program(program: Program, machine: Machine) -> Timeline:
    """Return the timeline of ``program`` on ``machine``."""
    spans = _Clock(program, machine).run()
    return Timeline(program, machine, spans, max(span.end for span in spans))


def lanes_and_seconds(work: Work, machine: Machine) -> tuple[tuple[Lane, ...], float]:
    """Return what an operation occupies, and for how long. GPUs without a link of their own share that to the host."""
    if work.sent:
        rate = machine.gpu_link or machine.pcie
        lanes = (Lane.WIRE,) if machine.gpu_link else (Lane.WIRE, Lane.LINK_UP, Lane.LINK_DOWN)
        return lanes, COLLECTIVE_SECONDS + work.sent / rate
    if work.up:
        return (Lane.LINK_UP,), COPY_SECONDS + work.up / machine.pcie
    if work.down:
        return (Lane.LINK_DOWN,), COPY_SECONDS + work.down / machine.pcie
    if work.disk:
        return (Lane.DISK,), work.disk / machine.nvme
    return (Lane.COMPUTE,), machine.kernel_seconds(work.flops, work.memory)


class _Clock:
    """Moves time forward from one event to the next."""

    def __init__(self, program: Program, machine: Machine) -> None:
        self.operations, self.machine = program.operations, machine
        count = len(self.operations)
        work = [
            lanes_and_seconds(operation.work, machine) if operation.work else HOST_WAITS
            for operation in self.operations
        ]
        self.lanes, self.seconds = [lanes for lanes, _ in work], [seconds for _, seconds in work]
        self.issued, self.ready, self.start, self.end = ([NEVER] * count for _ in range(4))
        self.awaited: list[int | None] = [None] * count
        self.queues: dict[int, deque[int]] = defaultdict(deque)  # operations of each stream, issued and not yet ended
        self.unmet: dict[int, set[int]] = {}  # what the first operation of a queue, or the host, still waits for
        self.waiters: dict[int, list[int]] = defaultdict(list)  # streams that wait for an operation
        self.held: list[tuple[float, int]] = []  # ready operations that wait for their lanes
        self.free = set(Lane)
        self.events: list[tuple[float, int]] = []  # a time, and an operation that ends then, or ``HOST``
        self.position = 0  # number of the operation that the host comes to next

    def run(self) -> list[Span]:
        """Return the spans of all operations."""
        self._schedule_host(0.0)
        while self.events:
            now, number = heapq.heappop(self.events)
            if number == HOST:
                self._advance_host(now)
            else:
                self._finish(now, number)
        assert self.position == len(self.operations), "an operation waits for one that never ends"
        return [
            Span(number, *values)
            for number, values in enumerate(
                zip(self.lanes, self.issued, self.ready, self.start, self.end, self.awaited, strict=True)
            )
        ]

    def _schedule_host(self, now: float) -> None:
        """Let the host come to its next operation; giving one out takes time."""
        if self.position < len(self.operations):
            is_own = self.operations[self.position].stream == HOST
            heapq.heappush(self.events, (now if is_own else now + self.machine.launch_seconds, HOST))

    def _advance_host(self, now: float) -> None:
        number, self.position = self.position, self.position + 1
        self.issued[number] = now
        queue = self.queues[self.operations[number].stream]
        queue.append(number)
        if len(queue) == 1:
            self._begin_waiting(now, number)
        if self.operations[number].stream != HOST:
            self._schedule_host(now)

    def _begin_waiting(self, now: float, number: int) -> None:
        """Let the first operation of a queue wait for what has not ended yet."""
        operation = self.operations[number]
        unmet = {
            wait.operation
            for wait in operation.waits
            if self.end[wait.operation] == NEVER or self.end[wait.operation] > now
        }
        self.unmet[operation.stream] = unmet
        for awaited in unmet:
            self.waiters[awaited].append(operation.stream)
        if operation.stream == HOST:
            self.start[number] = now
        if not unmet:
            self._become_ready(now, number)

    def _become_ready(self, now: float, number: int) -> None:
        self.ready[number] = now
        if self.operations[number].stream == HOST:
            self._finish(now, number)
            self._schedule_host(now)
        else:
            self.held.append((now, number))
            self._start_held(now)

    def _start_held(self, now: float) -> None:
        """Start the operations whose lanes are free, in the order in which they became ready."""
        for entry in sorted(self.held):
            number = entry[1]
            if self.free.issuperset(self.lanes[number]):
                self.held.remove(entry)
                self.free.difference_update(self.lanes[number])
                self.start[number] = now
                heapq.heappush(self.events, (now + self.seconds[number], number))

    def _finish(self, now: float, number: int) -> None:
        self.end[number] = now
        stream = self.operations[number].stream
        queue = self.queues[stream]
        queue.popleft()
        if stream != HOST:
            self.free.update(self.lanes[number])
        for waiter in self.waiters.pop(number, ()):
            self.unmet[waiter].discard(number)
            if not self.unmet[waiter]:
                first = self.queues[waiter][0]
                self.awaited[first] = number
                self._become_ready(now, first)
        if queue:
            self.awaited[queue[0]] = number
            self._begin_waiting(now, queue[0])
        self._start_held(now)
