"""Full copies of small (persistent) parameters, which stay gathered and are refreshed together after each step."""

from collections import defaultdict
from collections.abc import Sequence

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from lomo_ds.zero3.shard import Partitioned
from lomo_ds.zero3.transport import aligned_layout


class PersistentCopies:
    """Gathers all persistent parameters in one collective, with one copy kernel per shard length before and after it.

    The copies of parameters with equally long shards share one tensor, which every gather overwrites.

    Args:
        parameters: partitioned parameters whose shards are floats on the device.
    """

    def __init__(self, parameters: Sequence[Partitioned]) -> None:
        groups: dict[tuple[torch.dtype, int], list[Partitioned]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.ds_tensor.dtype, parameter.ds_tensor.ds_numel].append(parameter)
        self.groups = list(groups.values())
        self.group = parameters[0].ds_process_group
        self.copies: list[Tensor] = []  # for each group: parameters x ranks x elements of a shard

    def gather(self) -> None:
        """Gather all parameters from their current shards; none of them may be gathered already."""
        world_size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        shards = [[parameter.ds_tensor.data for parameter in parameters] for parameters in self.groups]
        spans, row_bytes = aligned_layout([sum(shard.nbytes for shard in group_shards) for group_shards in shards])
        device = get_accelerator().current_device_name()
        buffer = torch.empty(world_size, row_bytes, dtype=torch.uint8, device=device)
        parts = [buffer[:, span].view(group_shards[0].dtype) for span, group_shards in zip(spans, shards, strict=True)]
        for part, group_shards in zip(parts, shards, strict=True):
            torch.cat(group_shards, out=part[rank])
        if world_size > 1:
            dist.all_gather_into_tensor(buffer.view(-1), buffer[rank], group=self.group)
        by_parameter = [
            part.view(world_size, len(group_shards), -1).transpose(0, 1)
            for part, group_shards in zip(parts, shards, strict=True)
        ]
        self.copies = self.copies or [torch.empty(p.shape, dtype=p.dtype, device=device) for p in by_parameter]
        for copies, part, parameters in zip(self.copies, by_parameter, self.groups, strict=True):
            copies.copy_(part)
            for parameter, whole in zip(parameters, copies.flatten(1), strict=True):
                parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
