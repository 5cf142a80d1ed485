"""Store of shards on the compute device."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard


class DeviceStore:
    """Store whose shards are updated directly.

    Args:
        shards: on the compute device.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.values: dict[str, Values] = {shard.name: shard.values(number) for number, shard in enumerate(shards)}

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Do nothing: the shards are on the device already."""

    def open_for_update(
        self, names: Sequence[str], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[list[Values], list[Tensor]]]:
        """Implement ``Store.open_for_update``."""
        yield [self.values[name] for name in names], list(gradients)

    def flush(self) -> None:
        """Implement ``Store.flush``."""
