"""Buckets: small gradients share a launch, and the number of alive gradient elements is bounded."""

from collections import deque
from itertools import pairwise

import pytest

from lomo_ds.update.buckets import MAX_ALIVE_NUMEL, MAX_BUCKET_NUMEL, MIN_BUCKET_NUMEL, Buckets

HEAD, MLP, ATTENTION, NORM = 262_144_000, 180_355_072, 67_108_864, 8192  # elements of LLaMA 65B's parameters
LAYER = [*3 * [MLP], NORM, *4 * [ATTENTION], NORM]


class FakeCollectives:
    """Fake collectives, which are in flight until ``limit_in_flight`` completes them."""

    def __init__(self, largest: int) -> None:
        self.buckets: Buckets[int] = Buckets(largest, 8, self.launch, self.limit_in_flight)
        self.in_flight: deque[int] = deque()
        self.launched: list[int] = []
        self.completed = 0

    def launch(self, bucket: list[int]) -> None:
        self.in_flight.append(sum(bucket))
        self.launched.append(sum(bucket))

    def limit_in_flight(self, max_numel: int) -> None:
        while self.in_flight and sum(self.in_flight) > max_numel:
            self.completed += self.in_flight.popleft()


def after_each(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Return the elements in flight after each gradient of ``sizes``, and the elements of each launch."""
    collectives = FakeCollectives(max(sizes))
    in_flight = []
    for size in sizes:
        collectives.buckets.add(size, size)
        in_flight.append(sum(collectives.in_flight))
    collectives.buckets.flush()
    assert collectives.completed == sum(sizes)
    return in_flight, collectives.launched


def test_one_large_matrix_is_in_flight_until_the_next_arrives() -> None:
    sizes = [HEAD, NORM, *3 * LAYER, HEAD]
    in_flight, _ = after_each(sizes)
    for (before, after), size in zip(pairwise(in_flight[1:]), sizes[2:], strict=True):
        assert after == (before if size == NORM else size), "a small gradient does not wait for a large one"


def test_several_small_matrices_share_a_launch() -> None:
    size = MAX_BUCKET_NUMEL // 2
    in_flight, launched = after_each([HEAD // 2, *60 * [size]])
    assert max(in_flight[5:]) == MAX_ALIVE_NUMEL
    assert set(launched[1:]) == {2 * size}


@pytest.mark.parametrize("largest", [1000, MIN_BUCKET_NUMEL, 4 * MIN_BUCKET_NUMEL, HEAD])
def test_alive_elements_never_exceed_the_largest_parameter(largest: int) -> None:
    sizes = [largest, *[max(1, largest // part) for part in (2, 3, 3, 5, 1, 7, 1, 1, 100, 100, 2)]]
    collectives = FakeCollectives(largest)
    for size in sizes:
        collectives.buckets.add(size, size)
        assert sum(collectives.in_flight) + collectives.buckets.waiting_numel <= max(largest, MIN_BUCKET_NUMEL)


def test_a_large_gradient_is_launched_before_earlier_ones_are_waited_for() -> None:
    """So that the link between GPUs has work while the device waits."""
    calls: list[str] = []
    large = 4 * MIN_BUCKET_NUMEL
    buckets: Buckets[str] = Buckets(
        large, 2, lambda bucket: calls.append(f"launch {bucket[0]}"), lambda numel: calls.append(f"limit to {numel}")
    )
    buckets.add("one", large)
    buckets.add("two", large)
    assert calls == ["launch one", f"limit to {large}", "launch two", f"limit to {large}"]


def test_the_gradients_of_a_layer_may_all_be_in_flight() -> None:
    limits: list[int] = []
    buckets: Buckets[str] = Buckets(4 * MIN_BUCKET_NUMEL, 2, lambda bucket: None, limits.append)
    buckets.add("one", MIN_BUCKET_NUMEL, in_flight_numel=9 * MIN_BUCKET_NUMEL)
    assert limits == [8 * MIN_BUCKET_NUMEL]
