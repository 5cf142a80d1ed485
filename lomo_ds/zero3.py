"""Where the bytes are: the only file that reads or writes DeepSpeed's ``ds_*`` attributes of a parameter.

ZeRO-3 keeps each parameter as ``world size`` partitions of ceil(numel / world size) elements, one on each
rank, and gathers the whole of it around the modules that use it. A ``Shard`` is this rank's partition without
its padding. Writing to it changes the model; a gathered copy made before the write is stale from then on, so
``refresh`` ends every step.
"""

from collections.abc import Iterable, Iterator
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
from torch.nn import Parameter

Partitioned = Any  # a Parameter to which DeepSpeed has given its ds_ attributes


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: the rank-th piece of the flattened whole, as ``torch.chunk`` cuts it."""

    name: str
    data: Tensor  # 1-D view of the partition, padding left out; empty on ranks behind a tiny tensor's end
    group: ProcessGroup  # the ranks that hold the other parts

    @classmethod
    def of(cls, name: str, parameter: Partitioned) -> "Shard":
        """The shard of a parameter that ZeRO-3 has partitioned."""
        start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
        valid = min(max(parameter.ds_numel - start, 0), parameter.ds_tensor.ds_numel)
        return cls(name, parameter.ds_tensor.data.narrow(0, 0, valid), parameter.ds_process_group)


def partition(parameters: Iterable[Parameter], ds_config: dict[str, Any], dtype: torch.dtype) -> Iterator[Parameter]:
    """Split ``parameters`` over the ranks, one as each is asked for; the values of rank 0 become everyone's.

    The caller fills ``parameter.data`` on rank 0 before it asks for the next, so that one parameter at a time is
    whole. Yields each parameter before it is split.
    """
    converter: Init | None = None
    for parameter in parameters:
        yield parameter
        parameter.data = parameter.data.to(dtype)
        if converter is None:
            converter = Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=ds_config, dtype=dtype)
        else:
            converter._convert_to_zero_parameters([parameter])


@contextmanager
def gathered(parameters: list[Parameter]) -> Iterator[None]:
    """The whole ``parameters`` on every rank, to read."""
    with GatheredParameters(parameters):
        yield


def whole_numel(parameter: Partitioned) -> int:
    """Number of elements of the whole parameter, partitioned or not."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


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
