"""A clock for each lane of a machine, which moves forward as operations are planned."""

import math
from collections import Counter
from collections.abc import Iterable

from lomo_ds.simulate.machine import Machine
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.timeline import Lane, lanes_and_seconds
from lomo_ds.zero3 import default_pieces

BUFFER_BYTES = math.prod(default_pieces(itemsize=2))  # between a drive and the GPU


class LaneClocks:
    """Runs operations as early as possible, in the order in which they are given.

    Attributes:
        time: when each lane is free; that of the host, when it has given out all operations so far.
        busy: seconds in which each lane works.
        moved: bytes that went up, down, to peers, and to or from a drive.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.time = dict.fromkeys(Lane, 0.0)
        self.busy = dict.fromkeys(Lane, 0.0)
        self.moved = Counter[str]()
        self.seconds: dict[int, tuple[Counter[Work], float, int]] = {}  # of kernels that were seen before, by id

    @property
    def now(self) -> float:
        """The time at which everything has ended."""
        return max(self.time.values())

    @property
    def compute(self) -> float:
        """The time at which all kernels so far have ended."""
        return self.time[Lane.COMPUTE]

    def wait(self, until: float, lane: Lane = Lane.COMPUTE) -> None:
        """Let a lane do nothing before a time."""
        self.time[lane] = max(self.time[lane], until)

    def run(self, work: Work, ready: float = 0.0) -> float:
        """Launch an operation, which starts no sooner than ``ready``; return when it ends."""
        lanes, seconds = lanes_and_seconds(work, self.machine)
        self._launch(1)
        end = max(ready, self.time[Lane.HOST], *(self.time[lane] for lane in lanes)) + seconds
        for lane in lanes:
            # a write that waits for its copy to a buffer lets reads pass, as far as there are buffers
            waits = min(BUFFER_BYTES, 2 * work.disk) / self.machine.nvme if lane is Lane.DISK else 0.0
            self.time[lane] = max(self.time[lane] + seconds, end - waits)
            self.busy[lane] += seconds
        for name in ("up", "down", "sent", "disk"):
            self.moved[name] += getattr(work, name)
        return end

    def run_in_order(self, operations: Iterable[Work], ready: float = 0.0) -> float:
        """Launch operations of which each waits for the one before; return when the last one ends."""
        for work in operations:
            ready = self.run(work, ready)
        return ready

    def run_kernels(self, kernels: Counter[Work]) -> None:
        """Launch kernels one after the other, each of them as often as counted."""
        if id(kernels) not in self.seconds:
            seconds = sum(
                count * self.machine.kernel_seconds(work.flops, work.memory) for work, count in kernels.items()
            )
            self.seconds[id(kernels)] = kernels, seconds, kernels.total()
        _, seconds, count = self.seconds[id(kernels)]
        if not count:
            return
        begin = max(self.compute, self.time[Lane.HOST] + self.machine.launch_seconds)
        self._launch(count)
        self.time[Lane.COMPUTE] = max(begin + seconds, self.time[Lane.HOST] + seconds / count)
        self.busy[Lane.COMPUTE] += seconds

    def repeat(self, since: "LaneClocks", times: int) -> None:
        """Count what has happened since an earlier copy of the clocks so many times more."""
        passed = self.now - since.now
        for lane in Lane:
            self.time[lane] += times * passed
            self.busy[lane] += times * (self.busy[lane] - since.busy[lane])
        for name in self.moved:
            self.moved[name] += times * (self.moved[name] - since.moved[name])

    def copy(self) -> "LaneClocks":
        """Return a copy."""
        clocks = LaneClocks(self.machine)
        clocks.time, clocks.busy, clocks.moved = dict(self.time), dict(self.busy), self.moved.copy()
        return clocks

    def _launch(self, count: int) -> None:
        seconds = count * self.machine.launch_seconds
        self.time[Lane.HOST] += seconds
        self.busy[Lane.HOST] += seconds
