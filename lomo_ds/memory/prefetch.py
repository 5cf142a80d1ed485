"""Prefetching of host tensors in the order of the previous round."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch import Tensor

from lomo_ds.memory import host_memory
from lomo_ds.memory.host_memory import Fetch, HostTransfer

LOOK_AHEAD = 8  # tensors: enough to hide the latency of a copy, few enough to check at each ``take``

Key = TypeVar("Key")


class Prefetcher(Generic[Key]):
    """Fetches host tensors in the announced order, then in the order in which they followed in the previous round.

    If the order changes, unused copies are dropped, which costs time but is correct. Besides the tensor in use, at most
    ``IN_FLIGHT_BYTES`` are on the device, or one larger tensor.

    Args:
        host_tensor_of: returns the host tensor of a key; None if there is nothing to fetch.
    """

    def __init__(self, transfer: HostTransfer, host_tensor_of: Callable[[Key], Tensor | None]) -> None:
        self.transfer = transfer
        self.host_tensor_of = host_tensor_of
        self.successors: dict[Key, Key] = {}
        self.last: Key | None = None
        self.fetches: dict[Key, Fetch] = {}

    def announce(self, key: Key) -> None:
        """Announce that ``key`` will be taken after all keys announced before."""
        if self.last is not None:
            self.successors[self.last] = key
        self.last = key

    def take(self, key: Key) -> Tensor:
        """Return the device copy of the tensor of ``key``, and start to fetch those that follow it."""
        self._start(key)
        upcoming = list(self._keys_after(key))
        for unused in self.fetches.keys() - {key, *upcoming}:
            self._drop(unused)
        for next_key in upcoming:
            self._start(next_key)
        return self.transfer.finish_fetch(self.fetches.pop(key))

    def flush(self) -> None:
        """End a round: drop unused copies, and record no successor of the last key."""
        self.last = None
        for key in list(self.fetches):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.transfer.finish_fetch(self.fetches.pop(key))  # the copy must finish before its memory is freed

    def _start(self, key: Key) -> None:
        host_tensor = self.host_tensor_of(key)
        if key not in self.fetches and host_tensor is not None:
            self.fetches[key] = self.transfer.start_fetch(host_tensor)

    def _keys_after(self, key: Key) -> Iterator[Key]:
        """Yield the keys that follow ``key``, up to the limit of bytes in flight."""
        nbytes = 0
        for number in range(LOOK_AHEAD):
            if key not in self.successors:
                return
            key = self.successors[key]
            host_tensor = self.host_tensor_of(key)
            nbytes += 0 if host_tensor is None else host_tensor.nbytes
            if number and nbytes > host_memory.IN_FLIGHT_BYTES:
                return
            yield key
