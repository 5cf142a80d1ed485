"""Gradient bucketing: groups small gradients into one collective, based only on their sizes."""

from collections.abc import Callable
from typing import Generic, TypeVar

# A bucket is launched when it has half as many elements as the largest parameter, or this many.
MAX_BUCKET_NUMEL = 2**23
# Limit on waiting and in-flight elements; the latest launch and one bucket may exceed it, to overlap with backward.
MAX_ALIVE_NUMEL = 2**26
# Lower bound of that limit, for small models; also the bucket size at world size 1, where nothing is communicated.
MIN_BUCKET_NUMEL = 2**18

Gradient = TypeVar("Gradient")


class Buckets(Generic[Gradient]):
    """Collects gradients into buckets and bounds the number of gradient elements that are alive.

    Waiting and in-flight gradients together have at most as many elements as the largest parameter, or
    ``MIN_BUCKET_NUMEL`` if that is more. Including the gradient that comes next, never more than two parameters'
    gradients are alive, plus one bucket while it is packed. Among matrices with ``MAX_ALIVE_NUMEL`` elements or more,
    only the latest is in flight. The caller may allow more.

    Args:
        largest_numel: elements of the largest parameter.
        launch: starts the reduction of one bucket.
        limit_in_flight: waits for the oldest launches until at most the given number of elements are in flight.
    """

    def __init__(
        self,
        largest_numel: int,
        world_size: int,
        launch: Callable[[list[Gradient]], None],
        limit_in_flight: Callable[[int], None],
    ) -> None:
        self.launch = launch
        self.limit_in_flight = limit_in_flight
        self.alive_numel = max(largest_numel, MIN_BUCKET_NUMEL)
        if world_size == 1:
            self.bucket_numel = MIN_BUCKET_NUMEL
        else:  # one bucket is in flight while the next one fills
            self.bucket_numel = min(self.alive_numel // 2, MAX_BUCKET_NUMEL)
        self.clear()

    def add(self, gradient: Gradient, numel: int, in_flight_numel: int = 0) -> None:
        """Add the next gradient, which has ``numel`` elements.

        Args:
            in_flight_numel: elements that may wait or be in flight in any case, this gradient included.
        """
        if self.waiting and numel >= self.bucket_numel:
            self._launch()
        latest_and_bucket = self.latest_numel + self.bucket_numel
        alive_numel = max(min(self.alive_numel, max(MAX_ALIVE_NUMEL, latest_and_bucket)), in_flight_numel)
        is_large = numel >= max(self.bucket_numel, MIN_BUCKET_NUMEL)
        if not is_large:
            self.limit_in_flight(alive_numel - self.waiting_numel - numel)
        self.waiting.append(gradient)
        self.waiting_numel += numel
        if self.waiting_numel >= self.bucket_numel:
            self._launch()
        if is_large:  # launched before earlier ones are waited for, so that the link between GPUs has work meanwhile
            self.limit_in_flight(max(alive_numel, numel))

    def flush(self) -> None:
        """Launch the last bucket, and wait for all launches."""
        if self.waiting:
            self._launch()
        self.limit_in_flight(0)

    def clear(self) -> None:
        """Drop all waiting gradients."""
        self.waiting: list[Gradient] = []
        self.waiting_numel = 0
        self.latest_numel = 0  # elements of the latest launch

    def _launch(self) -> None:
        bucket, numel = self.waiting, self.waiting_numel
        self.clear()
        self.latest_numel = numel
        self.launch(bucket)
