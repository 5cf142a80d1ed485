"""Gradients wait for each other no longer than a launch takes, and little is alive beside the one that comes."""

from collections import deque
from itertools import pairwise

import pytest

from lomo_ds.update.buckets import MAX_ALIVE_NUMEL, MAX_BUCKET_NUMEL, MIN_BUCKET_NUMEL, Buckets

HEAD, MLP, ATTENTION, NORM = 262_144_000, 180_355_072, 67_108_864, 8192  # elements of LLaMA 65B's parameters
LAYER = [*3 * [MLP], NORM, *4 * [ATTENTION], NORM]


class Wire:
    """Launches that are in flight until they are landed."""

    def __init__(self, largest: int) -> None:
        self.buckets: Buckets[int] = Buckets(largest, 8, self.launch, self.land)
        self.in_flight: deque[int] = deque()
        self.launched: list[int] = []
        self.delivered = 0

    def launch(self, bucket: list[int]) -> None:
        self.in_flight.append(sum(bucket))
        self.launched.append(sum(bucket))

    def land(self, until: int) -> None:
        while self.in_flight and sum(self.in_flight) > until:
            self.delivered += self.in_flight.popleft()


def after_each(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Elements in flight after each gradient of ``sizes``, and those of each launch."""
    wire = Wire(max(sizes))
    found = []
    for size in sizes:
        wire.buckets.add(size, size)
        found.append(sum(wire.in_flight))
    wire.buckets.flush()
    assert wire.delivered == sum(sizes)
    return found, wire.launched


def test_of_large_matrices_one_is_in_flight_until_the_next_has_come() -> None:
    sizes = [HEAD, NORM, *3 * LAYER, HEAD]
    in_flight, _ = after_each(sizes)
    for (before, after), size in zip(pairwise(in_flight[1:]), sizes[2:], strict=True):
        assert after == (before if size == NORM else size), "nothing small makes a large one land"


def test_small_matrices_travel_several_at_a_time() -> None:
    size = MAX_BUCKET_NUMEL // 2
    in_flight, launched = after_each([HEAD // 4, *30 * [size]])
    assert max(in_flight[5:]) == MAX_ALIVE_NUMEL
    assert set(launched[1:]) == {2 * size}


@pytest.mark.parametrize("largest", [1000, MIN_BUCKET_NUMEL, 4 * MIN_BUCKET_NUMEL, HEAD])
def test_what_is_alive_is_never_more_than_the_largest(largest: int) -> None:
    sizes = [largest, *[max(1, largest // part) for part in (2, 3, 3, 5, 1, 7, 1, 1, 100, 100, 2)]]
    wire = Wire(largest)
    for size in sizes:
        wire.buckets.add(size, size)
        assert sum(wire.in_flight) + wire.buckets.waiting_numel <= max(largest, MIN_BUCKET_NUMEL)
