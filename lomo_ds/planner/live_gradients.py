"""Simulates which gradients are alive at each event, from autograd to the end of the step, on numbers alone."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from lomo_ds.memory.host_memory import IN_FLIGHT_BYTES
from lomo_ds.memory.prefetch import LOOK_AHEAD
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.planner.gathered_params import GatheredParams
from lomo_ds.planner.rule_memory import RuleMemory
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_events import EventKind, StepTrace
from lomo_ds.update.buckets import Buckets
from lomo_ds.update.clipping import clipping_groups
from lomo_ds.update.schedules.gradient_footprint import GradientFootprint
from lomo_ds.zero3.gathering import layer_of
from lomo_ds.zero3.stores.host_store import max_offload_bytes


class LiveGradients(Protocol):
    """Device bytes of gradients, reduced or not.

    Attributes:
        level: bytes of gradients in flight now; ``stashed``, bytes kept on the device until the step ends.
        shards: bytes of updated shards that are being copied to host memory, and of shards that wait for their update.
    """

    level: int
    stashed: int
    shards: int

    def add(self, index: int) -> None:
        """Add the full gradient of a parameter."""

    def flush(self) -> None:
        """End the backward pass."""

    def finish(self) -> None:
        """End the step, with the updates that were deferred to it."""


class LomoGradients:
    """``LiveGradients`` of ``Reduction`` and an update schedule.

    Args:
        footprint: the gradient shards that the schedule keeps.
        rule: memory of the update rule.
        observe: callback, called after every change.
        on_cpu: whether ranks compute on the host.
        gathered: the gathered parameters. Shards in host memory are updated from them during backward.
    """

    def __init__(
        self,
        trace: StepTrace,
        settings: Settings,
        footprint: GradientFootprint,
        rule: RuleMemory,
        observe: Callable[[], None],
        on_cpu: bool,
        gathered: GatheredParams,
    ) -> None:
        self.gathered = gathered
        in_backward = settings.offload_param != "none" and not (footprint.on_device or footprint.on_host)
        rounds_gathers = settings.int8_weights or settings.quantized_gathers
        self.updates_gathered = in_backward and not rounds_gathers
        self.fetches_shards = in_backward and rounds_gathers
        order = [event.index for event in trace.events if event.kind is EventKind.GRADIENT]
        self.followers = {p: order[position + 1 : position + 1 + LOOK_AHEAD] for position, p in enumerate(order)}
        self.fetching = 0  # bytes being copied from host memory
        self.offloading: deque[int] = deque()  # parameters whose updated shards are being copied to host memory
        self.shards = 0
        self.copied_by_gloo = int(on_cpu)  # gloo reduces a copy of a bucket and scatters the copy
        self.settings, self.footprint, self.rule, self.observe = settings, footprint, rule, observe
        self.names, self.numels = trace.names, trace.numels
        stored = {name: self._stored_bytes(p) for p, name in enumerate(trace.names)}
        self.max_offload_bytes = max_offload_bytes(stored)
        self.layer_numel: Counter[str | None] = Counter()  # what may be in flight, see ``BackwardHooks.summed``
        if settings.joined > 1:
            for name, numel in zip(self.names, self.numels, strict=True):
                self.layer_numel[layer_of(name)] += numel if layer_of(name) else 0
        self.itemsize = settings.dtype.itemsize  # of a whole gradient
        self.reduced_itemsize = settings.gradient_dtype.itemsize
        self.buckets: Buckets[int] = Buckets(max(self.numels), settings.gpus, self._launch, self._land)
        self.stashing: deque[int] = deque()  # bytes of gradients that are being copied to host memory
        self.level = self.stashed = 0
        self.held: set[int] = set()  # parameters that have a stashed gradient
        self.in_flight: deque[tuple[list[int], int, int]] = deque()  # members, elements, bytes of the shards
        groups = clipping_groups(trace.names)
        self.group = groups
        self.missing = {group: groups.count(group) for group in set(groups)}
        self.waiting: deque[tuple[list[int], int]] = deque()  # members and bytes of shards that wait for sums
        # members and bytes of gradient shards that wait for the rest of their clipping group
        self.grouped: dict[int, tuple[list[int], int]] = {}

    def add(self, index: int) -> None:
        """Add a gradient to its bucket, like ``Reduction.add``."""
        numel = self.numels[index]
        if self.updates_gathered:
            self._hold_gathered(index)
        self._change(numel * self.itemsize)
        self.buckets.add(index, numel, self.layer_numel[layer_of(self.names[index])])

    def flush(self) -> None:
        """Reduce every bucket that is left and wait for all copies, like ``Reduction.flush``."""
        self.buckets.flush()
        for group in list(self.grouped):
            self._update_soon(*self.grouped.pop(group))
        self._limit_waiting(0)
        while self.stashing:
            self._change(-self.stashing.popleft())
        self._set_fetching(0)
        self._limit_offloading(0)

    def finish(self) -> None:
        """Implement ``LiveGradients.finish``."""
        if self.footprint.on_device or self.footprint.on_host:
            self._update(list(range(len(self.numels))))
        self.stashed = 0

    def _launch(self, members: list[int]) -> None:
        """Begin the reduce-scatter of a bucket, like ``Reduction``."""
        sizes = [self.numels[p] * self.reduced_itemsize for p in members]
        if self.reduced_itemsize != self.itemsize:  # converted together, before the originals are freed
            self._change(sum(sizes))
            self._change(-sum(self.numels[p] * self.itemsize for p in members))
        if self.settings.gpus == 1:
            for p, size in zip(members, sizes, strict=True):
                self._deliver([p], size)
            return
        padded = sum(self.settings.shard_numel(self.numels[p]) for p in members)
        copied = len(members) > 1 or padded * self.settings.gpus > self.numels[members[0]]
        bucket, shards = padded * self.settings.gpus * self.reduced_itemsize, padded * self.reduced_itemsize
        uneven = [p for p in members if self.settings.shard_numel(self.numels[p]) * self.settings.gpus > self.numels[p]]
        padding = self.reduced_itemsize * sum(self.settings.shard_numel(self.numels[p]) for p in uneven)
        if len(members) > 1:  # gradients are padded before they are packed, see ``interleave``
            self._change(padding * self.settings.gpus)
        if copied:
            self._change(bucket)
        if len(members) > 1:
            self._change(-padding * self.settings.gpus)
        self._change(shards)
        if copied:
            self._change(-sum(sizes))
        self.in_flight.append((members, padded * self.settings.gpus, shards))

    def _land(self, until: int) -> None:
        """Finish reduce-scatters, oldest first, until at most ``until`` elements are in flight."""
        while self.in_flight and sum(numel for _, numel, _ in self.in_flight) > until:
            members, numel, shards = self.in_flight.popleft()
            self._change(numel * self.reduced_itemsize * self.copied_by_gloo)
            self._deliver(members, shards)
            self._change(-numel * self.reduced_itemsize * (1 + self.copied_by_gloo))

    def _deliver(self, members: list[int], size: int) -> None:
        """Give the schedule the gradient shards of one buffer of ``size`` bytes."""
        if self.footprint.on_device:
            stashed = self.footprint.bytes_of(size, self.reduced_itemsize)
            self._change(stashed if stashed != size else 0)  # a converted copy, beside the buffer
            if members[0] not in self.held:
                self.stashed += stashed
            self.held.update(members)
            self._change(-size - (stashed if stashed != size else 0))
        elif self.footprint.on_host:
            stashed = self.footprint.bytes_of(size, self.reduced_itemsize)
            if members[0] in self.held:  # not the first micro-batch
                self._set_fetching(self._bytes_fetched_after(members[-1]))
            self.held.update(members)
            if stashed != size:  # a converted copy, or the sum with the fetched stash, beside the buffer
                self._change(stashed)
                self._change(-size)
            self.stashing.append(stashed)
            while len(self.stashing) > 1 and sum(self.stashing) > self.footprint.in_flight:
                self._change(-self.stashing.popleft())
        elif self.footprint.group:
            self._wait_for_group(members, size)
        else:
            self._update_soon(members, size)

    def _update_soon(self, members: list[int], size: int) -> None:
        """Update gradient shards once the sums over the ranks that the rule asks for have arrived, like ``Updater``."""
        if self.fetches_shards:
            self.shards += sum(self._stored_bytes(p) for p in members)
            self._set_fetching(self._bytes_fetched_after(members[-1]))
        self.waiting.append((members, size))
        self._limit_waiting(self.rule.sums)

    def _limit_waiting(self, until: int) -> None:
        """Update what waits, oldest first, until at most ``until`` buckets wait."""
        while len(self.waiting) > until:
            members, size = self.waiting.popleft()
            self._update(members)
            self._change(-size)
            if self.updates_gathered or self.fetches_shards:
                self.offloading += members
                self._limit_offloading(self.max_offload_bytes)

    def _hold_gathered(self, index: int) -> None:
        """Keep the shard of a gathered parameter, like ``HostStore.offer_gathered_weight``.

        At world size 1 the shard is a view of the gathered parameter, otherwise a copy.
        """
        if self.settings.gpus == 1:
            self.gathered.hold(index)
        else:
            self.shards += self._stored_bytes(index)

    def _limit_offloading(self, until: int) -> None:
        """Free offloaded shards, oldest first, like ``HostTransfer``; the newest is freed only if ``until`` is 0."""
        while len(self.offloading) > (1 if until else 0) and sum(map(self._stored_bytes, self.offloading)) > until:
            p = self.offloading.popleft()
            if self.updates_gathered and self.settings.gpus == 1:
                self.gathered.unhold(p)
            else:
                self.shards -= self._stored_bytes(p)

    def _bytes_fetched_after(self, p: int) -> int:
        """Return the bytes that ``Prefetcher`` fetches while the gradient of ``p`` is used."""
        nbytes = 0
        for number, follower in enumerate(self.followers[p]):
            stashed = self.footprint.bytes_of(self._shard_bytes(follower), self.reduced_itemsize)
            size = self._stored_bytes(follower) if self.fetches_shards else stashed
            if number and nbytes + size > IN_FLIGHT_BYTES:
                break
            nbytes += size
        return nbytes

    def _set_fetching(self, nbytes: int) -> None:
        self.fetching, before = nbytes, self.fetching
        self._change(nbytes - before)

    def _stored_bytes(self, p: int) -> int:
        return self.settings.stored_bytes(self.settings.shard_numel(self.numels[p]))

    def _shard_bytes(self, p: int) -> int:
        return self.settings.shard_numel(self.numels[p]) * self.reduced_itemsize

    def _wait_for_group(self, members: list[int], size: int) -> None:
        for p in members:
            group = self.group[p]
            waiting, nbytes = self.grouped.get(group, ([], 0))
            self.grouped[group] = [*waiting, p], nbytes + size // len(members)
            self.missing[group] -= 1
            if not self.missing[group]:
                self._update_soon(*self.grouped.pop(group))

    def _update(self, members: list[int]) -> None:
        temporary = self.rule.temporaries([self.settings.shard_numel(self.numels[p]) for p in members])
        self._change(temporary)
        self._change(-temporary)

    def _change(self, by: int) -> None:
        self.level += by
        self.observe()


class DeepSpeedGradients:
    """``LiveGradients`` of DeepSpeed's own ZeRO-3.

    DeepSpeed copies gradients into one bucket, reduces the bucket, and adds the result to the gradient partitions.
    """

    def __init__(self, trace: StepTrace, settings: Settings, observe: Callable[[], None]) -> None:
        self.settings, self.observe = settings, observe
        self.numels = trace.numels
        self.itemsize = settings.dtype.itemsize
        self.filled = 0
        self.level = self.stashed = self.shards = 0

    def add(self, index: int) -> None:
        """Add a full gradient, which lives until it has been copied into the bucket."""
        numel = self.numels[index]
        self._change(numel * self.itemsize)
        if self.filled + numel > self.settings.reduce_bucket_size:
            self._reduce()
        self.filled += numel
        self._change(-numel * self.itemsize)

    def flush(self) -> None:
        """Reduce the last bucket."""
        self._reduce()

    def finish(self) -> None:
        """Do nothing: ``step_memory`` counts the optimizer's step as a whole."""

    def _reduce(self) -> None:
        shards = ceil_div(self.filled, self.settings.gpus) * self.itemsize if self.settings.gpus > 1 else 0
        self._change(shards)
        self._change(-shards)
        self.filled = 0

    def _change(self, by: int) -> None:
        self.level += by
        self.observe()
