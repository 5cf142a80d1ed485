"""Store of shards on the compute device."""

from collections.abc import Sequence

from torch import Tensor

from lomo_ds.numerics.int8 import Values
from lomo_ds.zero3.shard import Shard


class DeviceStore:
    """Store whose shards are updated directly.

    Args:
        shards: on the compute device.
    """

    in_place = True

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.values: dict[str, Values] = {shard.name: shard.values(number) for number, shard in enumerate(shards)}

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Do nothing: the shards are on the device already."""

    def announce(self, names: Sequence[str]) -> None:
        """Do nothing: there is nothing to fetch."""

    def lend(self, name: str) -> Values:
        """Implement ``Store.lend``."""
        return self.values[name]

    def commit(self, name: str) -> None:
        """Do nothing: the update was in place."""

    def flush(self) -> None:
        """Do nothing: no copy is pending."""
