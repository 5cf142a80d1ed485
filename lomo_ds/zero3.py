"""Where the bytes are: the only file that reads or writes DeepSpeed's ``ds_*`` attributes of a parameter.

ZeRO-3 keeps each parameter as ``world size`` partitions of ceil(numel / world size) elements, one on each
rank, and gathers the whole of it around the modules that use it. A ``Shard`` is this rank's partition without
its padding. Writing to it changes the model; a gathered copy made before the write is stale from then on, so
``Gathering.refresh`` ends every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init, ZeroParamStatus
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
    converter = _converter([], ds_config, dtype)
    for name, parameter in model.named_parameters():
        # DeepSpeed splits what is there; on the meta device there is nothing
        torch.utils.swap_tensors(
            parameter, Parameter(torch.empty_like(parameter, dtype=dtype, device=device), parameter.requires_grad)
        )
        converter._convert_to_deepspeed_param(parameter)
        partitioned: Partitioned = parameter
        partitioned.partition()
        yield Shard.of(name, partitioned)


def stay_whole(ds_config: dict[str, Any]) -> bool:
    """Whether nothing is ever to be gathered: one rank, which holds its shards where it computes."""
    offload = ds_config["zero_optimization"].get("offload_param") or {}
    return dist.get_world_size() == 1 and offload.get("device", "none") == "none"


@contextmanager
def gathered(parameters: list[Parameter]) -> Iterator[None]:
    """The whole ``parameters`` on every rank, to read."""
    with GatheredParameters(parameters):
        yield


def whole_shape(parameter: Partitioned) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def split(model: Module, ds_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Give shards to those parameters that have none yet; their values stay."""
    whole = [parameter for parameter in model.parameters() if not hasattr(parameter, "ds_tensor")]
    if whole:
        _converter(whole, ds_config, dtype)


def lie_here(model: Module) -> bool:
    """Whether each rank's shards are whole parameters on the device that computes: one rank, nothing offloaded."""
    device = torch.device(get_accelerator().current_device_name())
    partitioned: list[Partitioned] = list(model.parameters())
    return dist.get_world_size() == 1 and all(parameter.ds_tensor.device == device for parameter in partitioned)


def make_whole(parameters: list[Partitioned]) -> None:
    """On one rank: let every parameter be its shard, where it is not; DeepSpeed's own gathering may copy it."""
    for parameter in parameters:
        if parameter.ds_status is not ZeroParamStatus.AVAILABLE:
            parameter.data = parameter.ds_tensor.data.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE


def _converter(parameters: list[Parameter], ds_config: dict[str, Any], dtype: torch.dtype) -> Init:
    """What splits parameters, and has split ``parameters``.

    It replaces ``torch.nn.functional.linear``, for the whole process, by one that keeps no view of a weight which is
    freed after forward, at several times the Python; not where weights are never freed.
    """
    if stay_whole(ds_config):
        zero = ds_config["zero_optimization"] | {"memory_efficient_linear": False}
        ds_config = ds_config | {"zero_optimization": zero}
    return Init(module=torch.nn.ParameterList(parameters), config_dict_or_path=ds_config, dtype=dtype)
