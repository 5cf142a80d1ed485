"""Simulates which parameters are gathered at each event: DeepSpeed's ZeRO-3 coordinator, on numbers without tensors.

It follows ``PartitionedParameterCoordinator`` of deepspeed 0.19 from the third step on, when the order of modules is
known: fetch what a module needs, prefetch what comes next, free what is not used again soon.
"""

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_events import EventKind, StepTrace
from lomo_ds.zero3 import LookaheadLimit, aligned_layout, gather_batches

RELEASED = "released, not yet freed"  # name of parameters that the host released before the GPU has used them


class GatheredParams(Protocol):
    """Bytes of gathered parameters, beside the shards.

    Attributes:
        level: bytes now; ``peak``, the most bytes since the caller last set ``peak``.
        gathers: requests since the caller last replaced the list, each with the parameters of its collectives.
        refreshed: bytes while the persistent parameters are gathered again at the end of a step.
    """

    level: int
    peak: int
    gathers: list[list[list[int]]]
    refreshed: int

    def handle(self, kind: EventKind, index: int) -> None:
        """Process the start or end of a module."""

    def hold(self, p: int) -> None:
        """Keep the gathered copy of a parameter until ``unhold``, even if the coordinator releases it before."""

    def unhold(self, p: int) -> None:
        """End a ``hold``."""

    def sizes(self) -> Counter[str]:
        """Return bytes by name of the parameters that are gathered or being gathered now."""
        ...


class NoGathering:
    """``GatheredParams`` of a single rank, whose shards are the full parameters."""

    level = peak = refreshed = 0

    def __init__(self) -> None:
        self.gathers: list[list[list[int]]] = []

    def handle(self, kind: EventKind, index: int) -> None:
        """Do nothing."""

    def hold(self, p: int) -> None:
        """Do nothing: there is no copy."""

    def unhold(self, p: int) -> None:
        """Do nothing: there is no copy."""

    def sizes(self) -> Counter[str]:
        """Return no bytes: there is no copy."""
        return Counter()


class _GatherBuffer:
    """One receive buffer of several parameters. It lives until each of them has been waited for."""

    def __init__(self, members: Sequence[int], size: int) -> None:
        self.members = set(members)
        self.pending = set(members)
        self.size = size
        self.arrived = False


class _Uses:
    """The steps of a pass that use each parameter; a step is the start of one module.

    Args:
        order: the modules of the pass.
        parameters: returns the parameters that a module uses.
        numels: elements of each parameter.
    """

    def __init__(self, order: Sequence[int], parameters: Callable[[int], list[int]], numels: Sequence[int]) -> None:
        used = {module: parameters(module) for module in order}
        self.steps: dict[int, list[int]] = {}
        for step, module in enumerate(order):
            for p in used[module]:
                self.steps.setdefault(p, []).append(step)
        totals = {module: sum(numels[p] for p in of_module) for module, of_module in used.items()}
        self.traversed = [0, *accumulate(totals[module] for module in order)]  # elements used before each step

    def distance(self, p: int, step: int) -> float:
        """Return the number of elements that are used from ``step`` on before ``p`` is."""
        steps = self.steps.get(p, [])
        later = bisect_left(steps, step)
        return self.traversed[steps[later]] - self.traversed[step] if later < len(steps) else math.inf


class SimulatedCoordinator:
    """``GatheredParams`` as DeepSpeed's hooks gather and release them on one rank.

    Args:
        ahead: bound on how far the host runs ahead of its GPU, if parameters are fetched in a stream of their own. The
            simulation assumes that the host is always as far ahead as allowed: the memory of a released parameter is
            free once the host has waited for the GPU. None: memory is free at once.
    """

    def __init__(self, trace: StepTrace, settings: Settings, ahead: LookaheadLimit | None) -> None:
        self.settings, self.ahead = settings, ahead
        self.released: deque[tuple[int, int]] = deque()  # not yet freed: number of the next request, and bytes
        self.uses_transport = not settings.is_baseline
        self.names, self.numels = trace.names, trace.numels
        self.modules = trace.modules
        begins = (EventKind.FETCH_FORWARD, EventKind.FETCH_BACKWARD)
        self.order = [event.index for event in trace.events if event.kind in begins]
        self.leaves = trace.leaves
        # what DeepSpeed finds in later modules as it releases a leaf, whose submodules it looks into, or another module
        self.uses_of_trees = _Uses(self.order, trace.parameters_inside, self.numels)
        self.uses = _Uses(self.order, lambda m: [] if m in trace.leaves else trace.modules[m], self.numels)
        self.persistent = {p for p, numel in enumerate(self.numels) if numel <= settings.persistence_threshold}
        self.available: dict[int, int] = {}  # bytes of gathered parameters
        self.in_flight: dict[int, _GatherBuffer] = {}  # by parameter
        self.active: dict[int, set[int]] = {}
        self.in_backward: dict[int, None] = {}
        self.held: set[int] = set()
        self.held_only: dict[int, int] = {}  # bytes of released parameters that live only because they are held
        self.level = self.peak = 0
        self.gathers: list[list[list[int]]] = []
        self._begin()
        for p in sorted(self.persistent):  # gathered together at the end of the previous step, never released
            self.available[p] = self._gathered_bytes(p)
        self._add(sum(self.available.values()))
        in_place = len(self.persistent) < 2 or (self.uses_transport and settings.gpus == 1)
        self.refreshed = self.level if in_place else 2 * self.level  # one receive buffer, and the copies made from it

    def _begin(self) -> None:
        """Begin a forward pass, like DeepSpeed's ``reset_step``."""
        self.step = self.live_numel = 0
        self.fetched_for: dict[int, int] = {}
        self.queue = deque((p, step) for step, module in enumerate(self.order) for p in sorted(self.modules[module]))

    def handle(self, kind: EventKind, index: int) -> None:
        """Implement ``GatheredParams.handle``."""
        if kind in (EventKind.FETCH_FORWARD, EventKind.FETCH_BACKWARD):
            if kind is EventKind.FETCH_BACKWARD:
                self.in_backward[index] = None
            self._fetch(index)
        elif kind in (EventKind.FREE_FORWARD, EventKind.FREE_BACKWARD):
            if kind is EventKind.FREE_BACKWARD:
                self.in_backward.pop(index, None)
            self._free(index)
        elif kind is EventKind.END:
            for module in reversed(self.in_backward):
                for p in self.modules[module]:
                    self.active.get(p, set()).discard(module)
                    if p not in self.persistent:
                        self._release(p)
            self.in_backward.clear()
            self._begin()
            self._free_released(None)

    def hold(self, p: int) -> None:
        """Implement ``GatheredParams.hold``."""
        self.held.add(p)

    def unhold(self, p: int) -> None:
        """Implement ``GatheredParams.unhold``."""
        self.held.discard(p)
        self._add(-self.held_only.pop(p, 0))

    def sizes(self) -> Counter[str]:
        """Implement ``GatheredParams.sizes``."""
        sizes = Counter({self.names[p]: size for p, size in (self.available | self.held_only).items()})
        for buffer in set(self.in_flight.values()):
            first, *rest = sorted(buffer.members)
            sizes[f"{self.names[first]}{f' and {len(rest)} more' if rest else ''}, received"] += buffer.size
        sizes[RELEASED] = sum(size for _, size in self.released)
        return +sizes

    def _fetch(self, module: int) -> None:
        params = sorted(self.modules[module])
        self._gather(params)
        for p in params:
            self.active.setdefault(p, set()).add(module)
            self._wait_for(p)
        new = [p for p in params if self.fetched_for.get(p, -1) < self.step]
        seen: set[int] = set()
        while self.queue and len(seen) < len(new):
            p, step = self.queue.popleft()
            self.fetched_for[p] = step
            seen.add(p)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        room = min(self.settings.max_live_parameters - self.live_numel, self.settings.prefetch_bucket_size)
        chosen: dict[int, None] = {}
        numel = 0
        while self.settings.prefetch_bucket_size > 0 and self.queue and numel < room:
            p, step = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for.get(p, -1), step)
            if p not in self.available and p not in self.in_flight and p not in chosen:
                chosen[p] = None
                numel += self.numels[p]
        self._gather(sorted(chosen))

    def _gather(self, params: Sequence[int]) -> None:
        missing = [p for p in params if p not in self.available and p not in self.in_flight]
        if not missing:
            return
        numel = sum(self.numels[p] for p in missing)
        if self.ahead is not None and (number := self.ahead.request(numel)) is not None:
            self._free_released(number)
        batches = self._batches(missing)
        for batch in batches:
            buffer = _GatherBuffer(batch, self._received_bytes(batch))
            self.in_flight.update(dict.fromkeys(batch, buffer))
            self._add(buffer.size)
        self.live_numel += numel
        self.gathers.append(batches)

    def _batches(self, params: list[int]) -> list[list[int]]:
        """Divide a request into collectives, like ``zero3.transport``; a single rank receives all at once."""
        if not self.uses_transport or self.settings.gpus == 1:
            return [params]
        sent = [self.settings.sent_bytes(self.settings.shard_numel(self.numels[p])) for p in params]
        return [[params[position] for position in batch] for batch in gather_batches(sent)]

    def _wait_for(self, p: int) -> None:
        buffer = self.in_flight.pop(p, None)
        if buffer is None:
            return
        if self.uses_transport:
            self._unpack(buffer)
            return
        if len(buffer.members) == 1:  # received into its final memory
            self.available[p] = buffer.size
            return
        if not buffer.arrived:
            buffer.arrived = True
            for member in sorted(buffer.members):
                self.available[member] = self.numels[member] * self.settings.dtype.itemsize
                self._add(self.available[member])
        buffer.pending.discard(p)
        if not buffer.pending:
            self._add(-buffer.size)

    def _unpack(self, buffer: _GatherBuffer) -> None:
        """Copy each parameter into a tensor of its own, then free the buffer, like ``zero3.transport``."""
        is_alone = self.settings.gpus == 1 or len(buffer.members) == 1
        for p in sorted(buffer.members):
            in_place = is_alone and not self.settings.is_sent_in_int8(self.settings.shard_numel(self.numels[p]))
            self.in_flight.pop(p, None)
            self.available[p] = self._gathered_bytes(p)
            self._add(0 if in_place else self._gathered_bytes(p))
            if self.settings.gpus == 1 and not in_place:  # each parameter was received on its own
                self._add(-self._received_bytes([p]))
        if self.settings.gpus > 1 and not in_place:
            self._add(-buffer.size)

    def _free(self, module: int) -> None:
        uses = self.uses_of_trees if module in self.leaves else self.uses
        for p in self.modules[module]:
            self.active.get(p, set()).discard(module)
            is_used_soon = uses.distance(p, self.step) < self.settings.max_reuse_distance
            if not (p in self.persistent or self.fetched_for.get(p, -1) > self.step or is_used_soon):
                self._release(p)

    def _release(self, p: int) -> None:
        if p in self.available and not self.active.get(p) and p not in self.in_flight:
            size = self.available.pop(p)
            self.live_numel -= self.numels[p]
            if p in self.held:
                self.held_only[p] = size
            elif self.ahead is None:
                self._add(-size)
            else:
                self.released.append((self.ahead.request_count, size))

    def _free_released(self, number: int | None) -> None:
        """Free what was released before request ``number``, which the GPU has reached; None: free everything."""
        while self.released and (number is None or self.released[0][0] <= number):
            self._add(-self.released.popleft()[1])

    def _gathered_bytes(self, p: int) -> int:
        """Return the bytes of a full parameter, with the padding of every rank's partition."""
        return self.settings.shard_numel(self.numels[p]) * self.settings.gpus * self.settings.dtype.itemsize

    def _received_bytes(self, params: Sequence[int]) -> int:
        """Return the bytes of the receive buffer of ``params``; with ``zero3.transport`` every shard is aligned."""
        if not self.uses_transport:
            return sum(self._gathered_bytes(p) for p in params)
        sent = [self.settings.sent_bytes(self.settings.shard_numel(self.numels[p])) for p in params]
        return aligned_layout(sent)[1] * self.settings.gpus

    def _add(self, size: int) -> None:
        self.level += size
        self.peak = max(self.peak, self.level)
