"""Fetches host tensors before they are asked for."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch import Tensor

from lomo_ds.memory import host_memory
from lomo_ds.memory.host_memory import Fetch, HostTransfer

LOOK_AHEAD = 8  # tensors: enough to hide that a copy begins late, few enough to look through at each

Key = TypeVar("Key")


class Prefetcher(Generic[Key]):
    """Fetches host tensors in the order that was announced, and then in the one that followed it the last time.

    An order that changes costs time only: what was fetched in vain is dropped. Beside the tensor in use at most
    ``IN_FLIGHT_BYTES``, or one tensor that is larger, are on the device.

    Args:
        host_tensor_of: the memory that belongs to a key; None where nothing is to be fetched.
    """

    def __init__(self, transfer: HostTransfer, host_tensor_of: Callable[[Key], Tensor | None]) -> None:
        self.transfer = transfer
        self.host_tensor_of = host_tensor_of
        self.followers: dict[Key, Key] = {}
        self.last: Key | None = None
        self.fetches: dict[Key, Fetch] = {}

    def announce(self, key: Key) -> None:
        """``key`` is used after all that were announced before."""
        if self.last is not None:
            self.followers[self.last] = key
        self.last = key

    def take(self, key: Key) -> Tensor:
        """What lies under ``key``, on the device; the fetches of those that follow it have begun."""
        self._start(key)
        ahead = list(self._ahead_of(key))
        for other in self.fetches.keys() - {key, *ahead}:
            self._drop(other)
        for other in ahead:
            self._start(other)
        return self.transfer.finish_fetch(self.fetches.pop(key))

    def flush(self) -> None:
        """End a round: nothing follows its last key, and what nobody has asked for is dropped."""
        self.last = None
        for key in list(self.fetches):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.transfer.finish_fetch(self.fetches.pop(key))  # its copy must finish before its memory is freed

    def _start(self, key: Key) -> None:
        host_tensor = self.host_tensor_of(key)
        if key not in self.fetches and host_tensor is not None:
            self.fetches[key] = self.transfer.start_fetch(host_tensor)

    def _ahead_of(self, key: Key) -> Iterator[Key]:
        """The next keys with something to fetch, as many as may be on the device."""
        nbytes = 0
        for number in range(LOOK_AHEAD):
            if key not in self.followers:
                return
            key = self.followers[key]
            host_tensor = self.host_tensor_of(key)
            nbytes += 0 if host_tensor is None else host_tensor.nbytes
            if number and nbytes > host_memory.IN_FLIGHT_BYTES:
                return
            yield key
