"""Which parameters are whole at each moment: DeepSpeed's coordinator of ZeRO-3, on numbers instead of tensors.

It follows ``PartitionedParameterCoordinator`` of deepspeed 0.19 in a step whose order of modules it knows, from the
third step on: fetch what a module needs, prefetch what comes next, free what is not used again soon.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from lomo_ds.planner.moments import Event, Rehearsal
from lomo_ds.planner.settings import Settings
from lomo_ds.zero3 import Ahead, lay_out

LINGERING = "released, and not computed with yet"


class Gathered(Protocol):
    """Bytes of whole parameters beside the shards.

    Attributes:
        level: now; ``peak``, the most since it was last asked for.
        moved: elements of parameters that were gathered so far.
        refreshed: bytes while those that are never let go of are gathered anew, when a step has ended.
    """

    level: int
    peak: int
    moved: int
    refreshed: int

    def see(self, event: Event, index: int) -> None:
        """A module begins or ends."""

    def hold(self, p: int) -> None:
        """A parameter's whole copy lives until ``let_go``, whoever frees it before."""

    def let_go(self, p: int) -> None:
        """See ``hold``."""

    def sizes(self) -> Counter[str]:
        """Bytes by the parameter's name, of those that are whole now or on their way."""
        ...


class NothingGathered:
    """One rank whose shards are the parameters."""

    level = peak = moved = refreshed = 0

    def see(self, event: Event, index: int) -> None:
        """Nothing."""

    def hold(self, p: int) -> None:
        """Nothing: there is no copy."""

    def let_go(self, p: int) -> None:
        """Nothing: there is no copy."""

    def sizes(self) -> Counter[str]:
        """Nothing: there is no copy."""
        return Counter()


class _Lot:
    """Parameters on their way in one buffer, which lives until the last of them has been asked for."""

    def __init__(self, members: Sequence[int], size: int) -> None:
        self.members = set(members)
        self.waiting = set(members)
        self.size = size
        self.arrived = False


class CoordinatorGathers:
    """DeepSpeed's hooks, on a rank.

    Args:
        ahead: what bounds a host that is ahead of its GPU, where parameters are fetched in a stream of their own. The
            host is taken to be as far ahead as it may: what it has released gives its memory back when it has waited
            for the GPU. None where it gives it back at once.
    """

    def __init__(self, rehearsal: Rehearsal, settings: Settings, ahead: Ahead | None) -> None:
        self.settings, self.ahead = settings, ahead
        self.lingering: deque[tuple[int, int]] = deque()  # released: number of the ask that came next, and bytes
        self.wired = settings.optimizer == "lomo" and (settings.offload_param != "none" or settings.int8_weights)
        self.names, self.numels = rehearsal.names, rehearsal.numels
        self.modules = rehearsal.modules
        begins = (Event.FETCH_FORWARD, Event.FETCH_BACKWARD)
        self.order = [moment.index for moment in rehearsal.moments if moment.event in begins]
        self.uses: dict[int, list[int]] = {}  # the steps that want a parameter
        for step, module in enumerate(self.order):
            for p in self.modules[module]:
                self.uses.setdefault(p, []).append(step)
        numels = [sum(self.numels[p] for p in self.modules[module]) for module in self.order]
        self.traversed = [0, *accumulate(numels)]  # elements that the steps before each have wanted
        self.persistent = {p for p, numel in enumerate(self.numels) if numel <= settings.persistence_threshold}
        self.available: dict[int, int] = {}  # whole parameters, and their bytes
        self.lots: dict[int, _Lot] = {}  # in flight, by parameter
        self.active: dict[int, set[int]] = {}
        self.in_backward: dict[int, None] = {}
        self.held: set[int] = set()
        self.kept: dict[int, int] = {}  # bytes of those held that would be free
        self.moved = self.level = self.peak = 0
        self._begin()
        for p in sorted(self.persistent):  # gathered together after the last step, and let go of by nobody
            self.available[p] = self._whole(p)
        self._add(sum(self.available.values()))
        alone = len(self.persistent) < 2 or (self.wired and settings.gpus == 1)
        self.refreshed = self.level if alone else 2 * self.level  # received together, then copied from there

    def _begin(self) -> None:
        """A forward pass begins; see ``reset_step``."""
        self.step = self.live_numel = 0
        self.fetched_for: dict[int, int] = {}
        self.queue = deque((p, step) for step, module in enumerate(self.order) for p in sorted(self.modules[module]))

    def see(self, event: Event, index: int) -> None:
        """See ``Gathered.see``."""
        if event in (Event.FETCH_FORWARD, Event.FETCH_BACKWARD):
            if event is Event.FETCH_BACKWARD:
                self.in_backward[index] = None
            self._fetch(index)
        elif event in (Event.FREE_FORWARD, Event.FREE_BACKWARD):
            if event is Event.FREE_BACKWARD:
                self.in_backward.pop(index, None)
            self._free(index)
        elif event is Event.END:
            for module in reversed(self.in_backward):
                for p in self.modules[module]:
                    self.active.get(p, set()).discard(module)
                    if p not in self.persistent:
                        self._release(p)
            self.in_backward.clear()
            self._begin()
            self._come_to(None)

    def hold(self, p: int) -> None:
        """See ``Gathered.hold``."""
        self.held.add(p)

    def let_go(self, p: int) -> None:
        """See ``Gathered.hold``."""
        self.held.discard(p)
        self._add(-self.kept.pop(p, 0))

    def sizes(self) -> Counter[str]:
        """See ``Gathered.sizes``."""
        sizes = Counter({self.names[p]: size for p, size in (self.available | self.kept).items()})
        for lot in set(self.lots.values()):
            first, *others = sorted(lot.members)
            sizes[f"{self.names[first]}{f' and {len(others)} more' if others else ''}, received"] += lot.size
        sizes[LINGERING] = sum(size for _, size in self.lingering)
        return +sizes

    def _fetch(self, module: int) -> None:
        wanted = sorted(self.modules[module])
        self._gather(wanted)
        for p in wanted:
            self.active.setdefault(p, set()).add(module)
            self._await(p)
        new = [p for p in wanted if self.fetched_for.get(p, -1) < self.step]
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
            if p not in self.available and p not in self.lots and p not in chosen:
                chosen[p] = None
                numel += self.numels[p]
        self._gather(sorted(chosen))

    def _gather(self, parameters: Sequence[int]) -> None:
        missing = [p for p in parameters if p not in self.available and p not in self.lots]
        if not missing:
            return
        numel = sum(self.numels[p] for p in missing)
        if self.ahead is not None and (number := self.ahead.ask(numel)) is not None:
            self._come_to(number)
        lot = _Lot(missing, self._received(missing))
        self.lots.update(dict.fromkeys(missing, lot))
        self.live_numel += numel
        self.moved += numel
        self._add(lot.size)

    def _await(self, p: int) -> None:
        lot = self.lots.pop(p, None)
        if lot is None:
            return
        if self.wired:
            self._open(lot)
            return
        if len(lot.members) == 1:  # received where it is to lie
            self.available[p] = lot.size
            return
        if not lot.arrived:
            lot.arrived = True
            for member in sorted(lot.members):
                self.available[member] = self.numels[member] * self.settings.dtype.itemsize
                self._add(self.available[member])
        lot.waiting.discard(p)
        if not lot.waiting:
            self._add(-lot.size)

    def _open(self, lot: _Lot) -> None:
        """Each parameter gets a tensor of its own, and the buffer is freed with the last; see ``zero3.transport``."""
        in_place = not self.settings.int8_weights and (self.settings.gpus == 1 or len(lot.members) == 1)
        for p in sorted(lot.members):
            self.lots.pop(p, None)
            self.available[p] = self._whole(p)
            self._add(0 if in_place else self._whole(p))
            if self.settings.gpus == 1 and not in_place:  # each has come by itself
                self._add(-self._received([p]))
        if self.settings.gpus > 1 and not in_place:
            self._add(-lot.size)

    def _free(self, module: int) -> None:
        for p in self.modules[module]:
            self.active.get(p, set()).discard(module)
            if not (p in self.persistent or self.fetched_for.get(p, -1) > self.step or self._is_used_soon(p)):
                self._release(p)

    def _is_used_soon(self, p: int) -> bool:
        """Whether less than ``max_reuse_distance`` is wanted before ``p`` is again."""
        uses = self.uses[p]
        later = bisect_left(uses, self.step)
        if later == len(uses):
            return False
        return self.traversed[uses[later]] - self.traversed[self.step] < self.settings.max_reuse_distance

    def _release(self, p: int) -> None:
        if p in self.available and not self.active.get(p) and p not in self.lots:
            size = self.available.pop(p)
            self.live_numel -= self.numels[p]
            if p in self.held:
                self.kept[p] = size
            elif self.ahead is None:
                self._add(-size)
            else:
                self.lingering.append((self.ahead.asked, size))

    def _come_to(self, number: int | None) -> None:
        """The GPU has computed all that comes before the ask of this number; None for all that was launched."""
        while self.lingering and (number is None or self.lingering[0][0] <= number):
            self._add(-self.lingering.popleft()[1])

    def _whole(self, p: int) -> int:
        """Bytes of the buffer that all ranks' partitions are received in."""
        return self.settings.shard_numel(self.numels[p]) * self.settings.gpus * self.settings.dtype.itemsize

    def _received(self, parameters: Sequence[int]) -> int:
        """Bytes of parameters on their way, which all ranks send: over a wire in one buffer, each shard aligned."""
        if not self.wired:
            return sum(self._whole(p) for p in parameters)
        sent = [self.settings.stored_bytes(self.settings.shard_numel(self.numels[p])) for p in parameters]
        return lay_out(sent)[1] * self.settings.gpus

    def _add(self, size: int) -> None:
        self.level += size
        self.peak = max(self.peak, self.level)
