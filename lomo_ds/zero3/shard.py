"""This rank's part of a parameter."""

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

Partitioned = Any  # a Parameter to which DeepSpeed has given its ds_ attributes


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: the rank-th piece of the flattened whole, as ``torch.chunk`` cuts it."""

    name: str
    data: Tensor  # 1-D view of the partition, padding left out; empty on ranks behind a tiny tensor's end
    start: int  # where it begins in the flattened whole
    shape: torch.Size  # of the whole
    group: ProcessGroup  # the ranks that hold the other parts

    @classmethod
    def of(cls, name: str, parameter: Partitioned) -> "Shard":
        """The shard of a parameter that ZeRO-3 has partitioned."""
        start = min(parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        valid = min(parameter.ds_numel - start, parameter.ds_tensor.ds_numel)
        data = parameter.ds_tensor.data.narrow(0, 0, valid)
        return cls(name, data, start, parameter.ds_shape, parameter.ds_process_group)

    @property
    def stop(self) -> int:
        """Where it ends in the flattened whole."""
        return self.start + self.data.numel()


def shards(model: Module) -> list[Shard]:
    """This rank's shard of every parameter, in the model's order."""
    return [Shard.of(name, parameter) for name, parameter in model.named_parameters()]


def whole_shape(parameter: Partitioned) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
