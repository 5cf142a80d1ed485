"""Whole copies of small parameters, which stay from step to step and are renewed together when one has ended."""

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
    """Gathers parameters in one collective, and takes a launch for each length of shard before and after it.

    The copies of shards as long share one tensor, which is written to again each time: they are never freed one by one.

    Args:
        parameters: partitioned, their shards floats on the device.
    """

    def __init__(self, parameters: Sequence[Partitioned]) -> None:
        alike: dict[tuple[torch.dtype, int], list[Partitioned]] = defaultdict(list)
        for parameter in parameters:
            alike[parameter.ds_tensor.dtype, parameter.ds_tensor.ds_numel].append(parameter)
        self.alike = list(alike.values())
        self.group = parameters[0].ds_process_group
        self.copies: list[Tensor] = []  # of each kind: parameters x ranks x elements of a shard

    def gather(self) -> None:
        """Let the parameters, none of which is whole, be so from what their shards are now."""
        world_size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        shards = [[parameter.ds_tensor.data for parameter in parameters] for parameters in self.alike]
        spans, row_bytes = aligned_layout([sum(shard.nbytes for shard in of_kind) for of_kind in shards])
        device = get_accelerator().current_device_name()
        buffer = torch.empty(world_size, row_bytes, dtype=torch.uint8, device=device)
        parts = [buffer[:, span].view(of_kind[0].dtype) for span, of_kind in zip(spans, shards, strict=True)]
        for part, of_kind in zip(parts, shards, strict=True):
            torch.cat(of_kind, out=part[rank])
        if world_size > 1:
            dist.all_gather_into_tensor(buffer.view(-1), buffer[rank], group=self.group)
        by_parameter = [
            part.view(world_size, len(of_kind), -1).transpose(0, 1) for part, of_kind in zip(parts, shards, strict=True)
        ]
        self.copies = self.copies or [torch.empty(p.shape, dtype=p.dtype, device=device) for p in by_parameter]
        for copies, part, parameters in zip(self.copies, by_parameter, self.alike, strict=True):
            copies.copy_(part)
            for parameter, whole in zip(parameters, copies.flatten(1), strict=True):
                parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
