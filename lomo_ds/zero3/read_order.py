"""Prediction of the order in which shards are read from NVMe: that of the previous step."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

HISTORY = 2**13  # reads that are remembered: those of several steps of a model with 80 layers
CONTEXT = 64  # reads that distinguish forward from backward: those of some layers

Item = TypeVar("Item")


class ReadOrder(Generic[Item]):
    """Expects the reads that followed the last time, after the same reads as now.

    An item that was written before it was read is expected only after it has been written again, since reading it
    sooner would be for nothing.
    """

    def __init__(self) -> None:
        self.history: list[tuple[Item, bool]] = []  # items read, and whether each was written before
        self.position = 0  # in the history, of the read that is expected next
        self.unread: list[Item] = []  # announced, and not read yet
        self.changed: weakref.WeakSet[Item] = weakref.WeakSet()  # items that were written and not announced since

    def announce(self, items: Sequence[Item]) -> None:
        """Announce that ``items`` are read next, in this order."""
        for item in items:
            is_expected = self.position < len(self.history) and self.history[self.position][0] is item
            self.position = (self.position if is_expected else self._last_position(item)) + 1
            self.history.append((item, item in self.changed))
            self.changed.discard(item)
        self.unread = list(items)
        if len(self.history) > 2 * HISTORY:
            del self.history[:HISTORY]
            self.position = max(self.position - HISTORY, 0)

    def note_read(self, item: Item) -> None:
        """Register that an item has been read."""
        if item in self.unread:
            self.unread.remove(item)

    def note_write(self, item: Item) -> None:
        """Register that an item has been written."""
        self.changed.add(item)

    def upcoming(self) -> Iterator[Item]:
        """Yield the items that are expected to be read next, up to the first that is written before."""
        yield from self.unread
        for position in range(self.position, len(self.history)):
            item, is_written = self.history[position]
            if is_written and item not in self.changed:
                return
            yield item

    def _last_position(self, item: Item) -> int:
        """Return where ``item`` was read after the same reads as now, as many as possible; the end if nowhere."""
        positions = [position for position, (earlier, _) in enumerate(self.history) if earlier is item]
        return max(reversed(positions), key=self._common_context, default=len(self.history))

    def _common_context(self, position: int) -> int:
        """Return how many of the last reads also came before ``position``, in the same order."""
        limit = min(position, CONTEXT)
        for length in range(limit):
            if self.history[position - 1 - length][0] is not self.history[-1 - length][0]:
                return length
        return limit
