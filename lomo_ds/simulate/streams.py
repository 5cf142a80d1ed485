"""Streams and events of a simulated GPU. They record in a ``Program`` which operation waits for which."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lomo_ds.simulate.program import HOST, Operation, Program, Wait, Work

# Packages whose lines name an operation; those of the simulation itself never do
SOURCES = ("lomo_ds.", "deepspeed.runtime.", "transformers.")
SIMULATION = "lomo_ds.simulate."


class Streams:
    """The streams of one GPU, and the program that is being recorded.

    Attributes:
        compute: the stream of kernels, and the current one of every thread that has not chosen another.
    """

    def __init__(self) -> None:
        self.program = Program()
        self.all: list[SimulatedStream] = []
        self.compute = SimulatedStream(self, "compute")
        self._of_thread = threading.local()

    @property
    def current(self) -> "SimulatedStream":
        """The stream to which this thread adds operations."""
        stream: SimulatedStream = getattr(self._of_thread, "current", self.compute)
        return stream

    @current.setter
    def current(self, stream: "SimulatedStream") -> None:
        self._of_thread.current = stream

    @contextmanager
    def use(self, stream: "SimulatedStream | None") -> Iterator[None]:
        """Make ``stream`` the current one of this thread; None changes nothing."""
        before = self.current
        self.current = stream or before
        try:
            yield
        finally:
            self.current = before

    def begin_program(self) -> None:
        """Begin to record another program, in which all streams are idle."""
        self.program = Program(streams=self.program.streams)
        for stream in self.all:
            stream.last, stream.waits = None, {}

    def add(self, name: str, stream: int, work: Work | None, waits: dict[int, str]) -> int:
        """Add an operation to the program.

        Args:
            waits: the source of each wait, by the operation that is waited for.
        """
        waiting = tuple(Wait(number, source) for number, source in waits.items())
        in_backward = torch._C._current_graph_task_id() >= 0
        self.program.operations.append(Operation(name, stream, work, waiting, source_line(), in_backward))
        return len(self.program.operations) - 1

    def make_host_wait(self, name: str, operations: set[int]) -> None:
        """Let the host wait for operations."""
        self.add(name, HOST, None, dict.fromkeys(operations, source_line()))

    def synchronize(self) -> None:
        """Let the host wait for everything."""
        self.make_host_wait("synchronize", set().union(*(stream.unfinished() for stream in self.all)))


class SimulatedEvent:
    """A point in a stream, like ``torch.cuda.Event``."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.program: Program | None = None
        self.recorded: set[int] = set()

    @property
    def operations(self) -> set[int]:
        """The operations of the current program that end before the event happens."""
        return self.recorded if self.program is self.streams.program else set()

    def record(self, stream: "SimulatedStream | None" = None) -> None:
        """Move the event to the end of a stream."""
        self.program = self.streams.program
        self.recorded = (stream or self.streams.current).unfinished()

    def wait(self, stream: "SimulatedStream | None" = None) -> None:
        """Let later operations of a stream wait."""
        (stream or self.streams.current).wait_event(self)

    def query(self) -> bool:
        """Return False: a program does not know times, and code must not depend on them."""
        return False

    def synchronize(self) -> None:
        """Let the host wait."""
        self.streams.make_host_wait("event.synchronize", self.operations)


class SimulatedStream:
    """A queue of operations that the GPU runs one after the other, like ``torch.cuda.Stream``."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.streams = streams
        self.number = len(streams.all)
        streams.all.append(self)
        streams.program.streams.append(name)
        self.last: int | None = None  # the operation that was added last
        self.waits: dict[int, str] = {}  # what the next one waits for, see ``Streams.add``

    def unfinished(self) -> set[int]:
        """Return the operations after which everything in the stream has ended."""
        return {*self.waits, *(() if self.last is None else (self.last,))}

    def add(self, name: str, work: Work) -> None:
        """Add an operation."""
        self.last, self.waits = self.streams.add(name, self.number, work, self.waits), {}

    def record_event(self, event: SimulatedEvent | None = None) -> SimulatedEvent:
        """Return an event at the end of the stream."""
        event = event or SimulatedEvent(self.streams)
        event.record(self)
        return event

    def wait_event(self, event: SimulatedEvent) -> None:
        """Let later operations wait for an event."""
        self._wait_for(event.operations)

    def wait_stream(self, stream: "SimulatedStream") -> None:
        """Let later operations wait for all that another stream has been given so far."""
        self._wait_for(stream.unfinished())

    def synchronize(self) -> None:
        """Let the host wait."""
        self.streams.make_host_wait("stream.synchronize", self.unfinished())

    def _wait_for(self, operations: set[int]) -> None:
        own = {self.last}
        self.waits |= dict.fromkeys(operations - own - self.waits.keys(), source_line())


def source_line() -> str:
    """Return file and line of the innermost caller in one of ``SOURCES``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(SOURCES) and not module.startswith(SIMULATION):
            return f"{module.replace('.', '/')}.py:{frame.f_lineno}"
        frame = frame.f_back
    return ""
