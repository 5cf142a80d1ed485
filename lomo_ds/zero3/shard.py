"""This rank's part of a parameter."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from lomo_ds.zero3.nvme import Place

Partitioned = Any  # a Parameter to which DeepSpeed has given its ds_ attributes


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: the rank-th piece of the flattened whole, as ``torch.chunk`` cuts it."""

    name: str
    # 1-D view of the partition, padding left out; empty on ranks behind a tiny tensor's end; meta where in a file
    data: Tensor
    start: int  # where it begins in the flattened whole
    shape: torch.Size  # of the whole
    group: ProcessGroup  # the ranks that hold the other parts
    place: Place | None = None  # where it lies, if that is not in memory

    @classmethod
    def of(cls, name: str, parameter: Partitioned) -> "Shard":
        """The shard of a parameter that ZeRO-3 has partitioned."""
        start = min(parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        valid = min(parameter.ds_numel - start, parameter.ds_tensor.ds_numel)
        place = place_of(parameter)
        if place is None:
            data = parameter.ds_tensor.data.narrow(0, 0, valid)
        else:
            data = torch.empty(valid, dtype=place.dtype, device="meta")
        return cls(name, data, start, parameter.ds_shape, parameter.ds_process_group, place)

    @property
    def stop(self) -> int:
        """Where it ends in the flattened whole."""
        return self.start + self.data.numel()

    def read(self) -> Tensor:
        """Its values: ``data`` itself, or a copy in host memory of what lies in the file."""
        return self.data if self.place is None else self.place.read(self.data.numel())

    def write(self, values: Tensor) -> None:
        """Give it other values (1-D, of its dtype, not written to any more)."""
        if self.place is None:
            self.data.copy_(values)
        else:
            self.place.write(values)

    def copy(self) -> "Shard":
        """Its values as they are now, where the device that computes takes no part: in host memory or another file."""
        if self.place is None:
            return dataclasses.replace(self, data=self.data.to("cpu", copy=True))
        return dataclasses.replace(self, place=self.place.copy())


def shards(model: Module) -> list[Shard]:
    """This rank's shard of every parameter, in the model's order."""
    return [Shard.of(name, parameter) for name, parameter in model.named_parameters()]


def place_of(parameter: Partitioned) -> Place | None:
    """The file that this rank's partition lies in; None if it is in memory."""
    return getattr(parameter.ds_tensor, "swap_place", None)


def whole_shape(parameter: Partitioned) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
