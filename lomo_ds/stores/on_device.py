"""Shards that lie where they are computed with."""

from collections.abc import Iterator, Sequence

from torch import Tensor


class OnDevice:
    """Lends the shards themselves.

    Args:
        shards: 1-D, on the device that computes.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.shards = shards

    def note_whole(self, index: int, whole: Tensor) -> None:
        """See ``Store.note_whole``; the shard is at hand anyway."""

    def lend(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """See ``Store.lend``."""
        yield [self.shards[index] for index in indices], list(gradients)

    def flush(self) -> None:
        """See ``Store.flush``."""
