"""Which gradients are alive at each moment, on numbers instead of tensors: from autograd to the end of the step."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.memory.prefetch import LOOK_AHEAD
from lomo_ds.planner.gathered import Gathered
from lomo_ds.planner.moments import Event, Rehearsal
from lomo_ds.planner.settings import Settings
from lomo_ds.update.buckets import Buckets
from lomo_ds.update.clipping import clipping_groups
from lomo_ds.update.rules.rule_bytes import Temporaries
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint


class Gradients(Protocol):
    """Bytes of gradients, reduced or whole.

    Attributes:
        level: in flight now; ``stashed``, kept on the device until the step ends.
        parts: of updated shards on their way to host memory, and of those that wait to be updated.
    """

    level: int
    stashed: int
    parts: int

    def add(self, index: int) -> None:
        """A parameter's gradient is whole."""

    def flush(self) -> None:
        """Backward has ended."""

    def finish(self) -> None:
        """The step ends, with the updates that have waited for it."""


class Reduced:
    """``Reduction`` and a schedule behind it.

    Args:
        keeps: what the schedule keeps.
        temporaries: what the rule's update of so many shard elements takes in passing, bytes.
        observe: is called at every change.
        on_cpu: whether ranks compute on the host.
        gathered: the whole parameters, of which shards in host memory are updated in backward.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        settings: Settings,
        keeps: GradientFootprint,
        temporaries: Temporaries,
        observe: Callable[[], None],
        on_cpu: bool,
        gathered: Gathered,
    ) -> None:
        self.gathered = gathered
        in_backward = settings.offload_param != "none" and not (keeps.on_device or keeps.on_host)
        self.notes_whole = in_backward and not settings.int8_weights
        self.fetches_shards = in_backward and settings.int8_weights
        order = [moment.index for moment in rehearsal.moments if moment.event is Event.GRADIENT]
        self.behind = {p: order[position + 1 : position + 1 + LOOK_AHEAD] for position, p in enumerate(order)}
        self.ahead = 0  # bytes on their way up
        self.sent: deque[int] = deque()  # parameters whose new shards are on their way to host memory
        self.parts = 0
        self.copied_by_gloo = int(on_cpu)  # which reduces a copy of a bucket, and scatters that
        self.settings, self.keeps, self.temporaries, self.observe = settings, keeps, temporaries, observe
        self.numels = rehearsal.numels
        self.itemsize = settings.dtype.itemsize
        self.buckets: Buckets[int] = Buckets(max(self.numels), settings.gpus, self._launch, self._land)
        self.leaving: deque[int] = deque()  # bytes of gradients on their way to host memory
        self.level = self.stashed = 0
        self.held: set[int] = set()
        self.flights: deque[tuple[list[int], int, int]] = deque()  # members, elements, bytes of the shards
        groups = clipping_groups(rehearsal.names)
        self.group = groups
        self.missing = {group: groups.count(group) for group in set(groups)}
        self.grouped: dict[int, int] = {}

    def add(self, index: int) -> None:
        """See ``Reduction.add``."""
        numel = self.numels[index]
        if self.notes_whole:
            self._note_whole(index)
        self._change(numel * self.itemsize)
        self.buckets.add(index, numel)

    def flush(self) -> None:
        """See ``Reduction.flush``."""
        self.buckets.flush()
        for group in list(self.grouped):
            self._change(-self.grouped.pop(group))
        while self.leaving:
            self._change(-self.leaving.popleft())
        self._look_ahead(0)
        self._send_home(0)

    def finish(self) -> None:
        """See ``Gradients.finish``."""
        if self.keeps.on_device or self.keeps.on_host:
            self._update(sum(self._part(p) for p in range(len(self.numels))))
        self.stashed = 0

    def _launch(self, members: list[int]) -> None:
        """See ``Reduction``."""
        sizes = [self.numels[p] * self.itemsize for p in members]
        if self.settings.gpus == 1:
            for p, size in zip(members, sizes, strict=True):
                self._deliver([p], size)
            return
        padded = sum(self.settings.shard_numel(self.numels[p]) for p in members)
        copied = len(members) > 1 or padded * self.settings.gpus > self.numels[members[0]]
        whole, shards = padded * self.settings.gpus * self.itemsize, padded * self.itemsize
        if copied:
            self._change(whole)
        self._change(shards)
        if copied:
            self._change(-sum(sizes))
        self.flights.append((members, padded * self.settings.gpus, shards))

    def _land(self, until: int) -> None:
        while self.flights and sum(numel for _, numel, _ in self.flights) > until:
            members, numel, shards = self.flights.popleft()
            self._change(numel * self.itemsize * self.copied_by_gloo)
            self._deliver(members, shards)
            self._change(-numel * self.itemsize * (1 + self.copied_by_gloo))

    def _deliver(self, members: list[int], size: int) -> None:
        """The schedule takes shards of ``size`` bytes together, which lie in one buffer."""
        if self.keeps.on_device:
            kept = self.keeps.bytes_of(size, self.itemsize)
            self._change(kept if kept != size else 0)  # converted, beside what came
            if members[0] not in self.held:
                self.stashed += kept
            self.held.update(members)
            self._change(-size - (kept if kept != size else 0))
        elif self.keeps.on_host:
            kept = self.keeps.bytes_of(size, self.itemsize)
            if members[0] in self.held:  # this micro-batch is not the first
                self._look_ahead(self._ahead_of(members[-1]))
            self.held.update(members)
            if kept != size:  # converted, or added to what was fetched, beside what came
                self._change(kept)
                self._change(-size)
            self.leaving.append(kept)
            while len(self.leaving) > 1 and sum(self.leaving) > self.keeps.in_flight:
                self._change(-self.leaving.popleft())
        elif self.keeps.group:
            self._wait_for_group(members, size)
        else:
            if self.fetches_shards:
                self.parts += sum(self._stored(p) for p in members)
                self._look_ahead(self._ahead_of(members[-1]))
            self._update(size)
            self._change(-size)
            if self.notes_whole or self.fetches_shards:
                self.sent += members
                self._send_home(IN_FLIGHT_BYTES)

    def _note_whole(self, index: int) -> None:
        """See ``HostStore.offer_gathered_weight``: one rank's part is a view of all, another's a copy."""
        if self.settings.gpus == 1:
            self.gathered.hold(index)
        else:
            self.parts += self._part(index)

    def _send_home(self, until: int) -> None:
        """See ``HostTransfer``: the newest is let go of by the next one, or at the end."""
        while len(self.sent) > (1 if until else 0) and sum(self._stored(p) for p in self.sent) > until:
            p = self.sent.popleft()
            if self.notes_whole and self.settings.gpus == 1:
                self.gathered.let_go(p)
            else:
                self.parts -= self._stored(p)

    def _ahead_of(self, p: int) -> int:
        """See ``Prefetcher``: bytes on their way up while the gradient of ``p`` is used."""
        nbytes = 0
        for number, follower in enumerate(self.behind[p]):
            kept = self.keeps.bytes_of(self._part(follower), self.itemsize)
            size = self._stored(follower) if self.fetches_shards else kept
            if number and nbytes + size > IN_FLIGHT_BYTES:
                break
            nbytes += size
        return nbytes

    def _look_ahead(self, nbytes: int) -> None:
        self.ahead, before = nbytes, self.ahead
        self._change(nbytes - before)

    def _stored(self, p: int) -> int:
        return self.settings.stored_bytes(self.settings.shard_numel(self.numels[p]))

    def _part(self, p: int) -> int:
        return self.settings.shard_numel(self.numels[p]) * self.itemsize

    def _wait_for_group(self, members: list[int], size: int) -> None:
        for p in members:
            group = self.group[p]
            self.grouped[group] = self.grouped.get(group, 0) + size // len(members)
            self.missing[group] -= 1
            if not self.missing[group]:
                self._update(self.grouped[group])
                self._change(-self.grouped.pop(group))

    def _update(self, size: int) -> None:
        in_passing = self.temporaries(size // self.itemsize)
        self._change(in_passing)
        self._change(-in_passing)

    def _change(self, by: int) -> None:
        self.level += by
        self.observe()


class Partitioned:
    """DeepSpeed's own ZeRO-3: gradients are copied into one bucket, reduced from there, and added to partitions."""

    def __init__(self, rehearsal: Rehearsal, settings: Settings, observe: Callable[[], None]) -> None:
        self.settings, self.observe = settings, observe
        self.numels = rehearsal.numels
        self.itemsize = settings.dtype.itemsize
        self.filled = 0
        self.level = self.stashed = self.parts = 0

    def add(self, index: int) -> None:
        """A whole gradient, until it is copied into the bucket."""
        numel = self.numels[index]
        self._change(numel * self.itemsize)
        if self.filled + numel > self.settings.reduce_bucket_size:
            self._reduce()
        self.filled += numel
        self._change(-numel * self.itemsize)

    def flush(self) -> None:
        """See ``Gradients.flush``."""
        self._reduce()

    def finish(self) -> None:
        """Nothing: the optimizer's step is counted as a whole."""

    def _reduce(self) -> None:
        shards = -(-self.filled // self.settings.gpus) * self.itemsize if self.settings.gpus > 1 else 0
        self._change(shards)
        self._change(-shards)
        self.filled = 0

    def _change(self, by: int) -> None:
        self.level += by
        self.observe()
