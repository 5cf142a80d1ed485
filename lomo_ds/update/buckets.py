"""Which gradients travel together, and when: a matter of their sizes alone."""

from collections.abc import Callable
from typing import Generic, TypeVar

# Small gradients travel together, until they have half as many elements as the largest parameter, and at most
MAX_BUCKET_NUMEL = 2**23
# What waits and is in flight may be as much, beside the one launch that travels while the next gradient is computed
MAX_ALIVE_NUMEL = 2**25
# However small a model is, as many elements may be alive; and as many are handed on together where nothing travels.
MIN_BUCKET_NUMEL = 2**18

Gradient = TypeVar("Gradient")


class Buckets(Generic[Gradient]):
    """Lets gradients wait for each other.

    What waits here and what is in flight have together no more elements than the largest parameter, or
    ``MIN_BUCKET_NUMEL``; with the one that comes next never more than two parameters' gradients are alive (and a
    bucket, while it is packed). Of matrices with ``MAX_ALIVE_NUMEL`` elements or more only the latest is in flight.

    Args:
        largest_numel: elements of the largest parameter.
        launch: sends off gradients that have waited together.
        land: waits for the oldest in flight until at most so many elements are.
    """

    def __init__(
        self,
        largest_numel: int,
        world_size: int,
        launch: Callable[[list[Gradient]], None],
        land: Callable[[int], None],
    ) -> None:
        self.launch = launch
        self.land = land
        self.alive_numel = max(largest_numel, MIN_BUCKET_NUMEL)
        if world_size == 1:
            self.bucket_numel = MIN_BUCKET_NUMEL
        else:  # one is on its way while the next one fills
            self.bucket_numel = min(self.alive_numel // 2, MAX_BUCKET_NUMEL)
        self.forget()

    def add(self, gradient: Gradient, numel: int) -> None:
        """Take the next gradient, of ``numel`` elements."""
        if self.waiting and numel >= self.bucket_numel:
            self._launch()
        latest_and_bucket = self.latest_numel + self.bucket_numel
        alive_numel = min(self.alive_numel, max(MAX_ALIVE_NUMEL, latest_and_bucket))
        self.land(alive_numel - self.waiting_numel - numel)
        self.waiting.append(gradient)
        self.waiting_numel += numel
        if self.waiting_numel >= self.bucket_numel:
            self._launch()

    def flush(self) -> None:
        """Send off what is left, and wait for all."""
        if self.waiting:
            self._launch()
        self.land(0)

    def forget(self) -> None:
        """Drop what waits."""
        self.waiting: list[Gradient] = []
        self.waiting_numel = 0
        self.latest_numel = 0  # elements of the last launch

    def _launch(self) -> None:
        bucket, numel = self.waiting, self.waiting_numel
        self.forget()
        self.latest_numel = numel
        self.launch(bucket)
