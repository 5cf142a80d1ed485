"""Protocol of stores, which hold this rank's shards and lend them to be updated."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lomo_ds.numerics.int8 import Values


class Store(Protocol):
    """Holds the shards of the trained parameters, by the parameters' names.

    A store knows where the bytes are and in what format. It does not know when or how a shard is updated.

    Attributes:
        in_place: whether a lent shard is the stored one. Otherwise it takes device memory until it is committed.
    """

    in_place: bool

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None:
        """Offer a gathered copy of a parameter on the device, whose shard is updated later in the same pass.

        Args:
            weight: the caller may free or overwrite it, but must not use it again in this pass.
        """
        ...

    def announce(self, names: Sequence[str]) -> None:
        """Announce that these shards will be lent, in this order, after all that were announced before."""
        ...

    def lend(self, name: str) -> Values:
        """Return a whole shard on the compute device, to be read and updated in place; then commit it.

        The host waits only for reads of a drive.
        """
        ...

    def commit(self, name: str) -> None:
        """Store the lent shard, whose update has been launched; the host waits only if the writes of a drive lag."""
        ...

    def flush(self) -> None:
        """End a pass: release device memory held for pending copies, for unused gathered copies and for lent shards."""
        ...
