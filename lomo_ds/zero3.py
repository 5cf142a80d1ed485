"""Where the bytes are: the only file that reads or writes DeepSpeed's ``ds_*`` attributes of a parameter.

ZeRO-3 keeps each parameter as ``world size`` partitions of ceil(numel / world size) elements, one on each
rank, and gathers the whole of it around the modules that use it. A ``Shard`` is this rank's partition without
its padding. Writing to it changes the model; a gathered copy made before the write is stale from then on, so
``refresh`` ends every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter

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


def partition(model: Module, ds_config: dict[str, Any], dtype: torch.dtype) -> Iterator[Shard]:
    """Make shards of a model on the meta device, without a collective.

    Yields each parameter's shard, whose values are the caller's to fill in: ``partition`` writes none. Beside the
    shards, one parameter at a time takes memory as a whole, which nobody touches.
    """
    device = get_accelerator().current_device_name()
    converter = Init(module=torch.nn.ParameterList(), config_dict_or_path=ds_config, dtype=dtype)
    for name, parameter in model.named_parameters():
        # DeepSpeed splits what is there; on the meta device there is nothing
        torch.utils.swap_tensors(
            parameter, Parameter(torch.empty_like(parameter, dtype=dtype, device=device), parameter.requires_grad)
        )
        converter._convert_to_deepspeed_param(parameter)
        partitioned: Partitioned = parameter
        partitioned.partition()
        yield Shard.of(name, partitioned)


@contextmanager
def gathered(parameters: list[Parameter]) -> Iterator[None]:
    """The whole ``parameters`` on every rank, to read."""
    with GatheredParameters(parameters):
        yield


def whole_shape(parameter: Partitioned) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def release(offload: DeepSpeedZeRoOffload) -> None:
    """Free the gathered copies that a backward pass leaves behind (an embedding's: its input needs no gradient)."""
    offload.release_backward_leftovers()


def refresh(offload: DeepSpeedZeRoOffload) -> None:
    """Drop every gathered copy and gather the persistent parameters anew, in one collective, from updated shards.

    DeepSpeed gathers on a stream that waits for no other, so the updates must have reached the shards by now.
    """
    get_accelerator().synchronize()
    offload.partition_all_parameters()
    if offload.persistent_parameters:
        offload.persistent_parameters[0].all_gather_coalesced(offload.persistent_parameters).wait()
