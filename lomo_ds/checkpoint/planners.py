"""Which values torch.distributed.checkpoint reads and writes: those in memory, or one file on NVMe at a time."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from lomo_ds.zero3 import Shard


class FromShards(DefaultSavePlanner):
    """Reads a shard on NVMe when it is to be written."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self.away = {shard.name: shard for shard in shards if shard.place is not None}

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of ``write_item``, which is a whole shard or buffer."""
        shard = self.away.get(write_item.index.fqn)
        return super().resolve_data(write_item) if shard is None else shard.read()


class IntoShards(DefaultLoadPlanner):
    """Writes a shard on NVMe as parts of it are read."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.away = {shard.name: shard for shard in shards if shard.place is not None}
        self.filling: tuple[str, Tensor] | None = None  # the shard that is being filled, all of it in host memory

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the parent's, which would give memory to every tensor on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: Any) -> Tensor:
        """Where the part of a shard is to be copied to, the shard as a whole."""
        shard = self.away.get(index.fqn)
        if shard is None:
            return super().lookup_tensor(index)
        if self.filling is None or self.filling[0] != index.fqn:
            self.filling = (index.fqn, shard.read())
        return self.filling[1]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """A part has been copied."""
        shard = self.away.get(read_item.dest_index.fqn)
        if shard is not None:
            assert self.filling is not None
            shard.write(self.filling[1])
