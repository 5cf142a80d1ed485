"""Shards that lie where they are computed with."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard


class DeviceStore:
    """Lends the shards themselves.

    Args:
        shards: on the device that computes.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.values: list[Values] = [shard.values(number) for number, shard in enumerate(shards)]

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        """See ``Store.offer_gathered_weight``; the shard is at hand anyway."""

    def open_for_update(
        self, indices: Sequence[int], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """See ``Store.open_for_update``."""
        yield [self.values[index] for index in indices], list(gradients)

    def flush(self) -> None:
        """See ``Store.flush``."""
