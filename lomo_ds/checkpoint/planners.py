"""Planners for torch.distributed.checkpoint that keep only one NVMe-offloaded shard in host memory at a time."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from lomo_ds.zero3 import Shard


class ShardSavePlanner(DefaultSavePlanner):
    """Save planner that reads a shard from NVMe only when it is written to the checkpoint."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self.on_nvme = {shard.name: shard for shard in shards if shard.slot is not None}

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the values of ``write_item``, which is an entire shard or buffer."""
        shard = self.on_nvme.get(write_item.index.fqn)
        return super().resolve_data(write_item) if shard is None else shard.read()


class ShardLoadPlanner(DefaultLoadPlanner):
    """Load planner that writes a shard back to NVMe as its parts are read from the checkpoint."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.on_nvme = {shard.name: shard for shard in shards if shard.slot is not None}
        self.filling: tuple[str, Tensor] | None = None  # name and host copy of the shard that is being filled

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Set up like the parent, but do not allocate memory for tensors on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: Any) -> Tensor:
        """Return the entire shard into which a part is copied."""
        shard = self.on_nvme.get(index.fqn)
        if shard is None:
            return super().lookup_tensor(index)
        if self.filling is None or self.filling[0] != index.fqn:
            self.filling = (index.fqn, shard.read())
        return self.filling[1]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Write the shard back to NVMe after a part has been copied into it."""
        shard = self.on_nvme.get(read_item.dest_index.fqn)
        if shard is not None:
            assert self.filling is not None
            shard.write(self.filling[1])
