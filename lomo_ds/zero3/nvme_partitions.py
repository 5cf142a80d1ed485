"""Partitions that go to a file on NVMe, and what DeepSpeed still does to them there."""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

from lomo_ds.zero3.nvme import SwapSpace
from lomo_ds.zero3.nvme_settings import nvme_settings
from lomo_ds.zero3.shard import Partitioned, slot_of


def swap_space(
    ds_config: dict[str, Any], dtype: torch.dtype, device: torch.device, parameters: Iterable[Partitioned] = ()
) -> SwapSpace:
    """The space that ``parameters`` lie in already, or a new one."""
    places = [place for place in map(slot_of, parameters) if place is not None]
    return places[0].space if places else SwapSpace(nvme_settings(ds_config, dtype.itemsize), device)


def move_to_nvme(parameter: Partitioned, space: SwapSpace) -> None:
    """Let a partition lie in a file, if it is large enough and does not yet; its memory is free from then on."""
    if slot_of(parameter) is not None:
        return
    _take_from_deepspeed(parameter)
    parameter.ds_tensor.swap_slot = None
    partition = parameter.ds_tensor
    if space.takes(partition.ds_numel * partition.element_size()):
        place = space.allocate_slot(partition.ds_numel, partition.dtype)
        place.write(partition.data)
        partition.swap_slot = place
        partition.data = partition.new_empty(0)


def move_to_memory(parameters: Iterable[Partitioned]) -> None:
    """Let every partition lie in host memory that is in a file."""
    for parameter in parameters:
        place = slot_of(parameter)
        if place is not None:
            parameter.ds_tensor.data = place.read(place.numel)
            parameter.ds_tensor.swap_slot = None


def _take_from_deepspeed(parameter: Partitioned) -> None:
    """Host memory for what ``deepspeed.zero.Init`` has swapped out by itself."""
    swapper = parameter.nvme_swapper
    if swapper is None:
        return
    parameter.nvme_swapper = None
    if parameter.ds_tensor.final_location is not None:
        swapper.swap_in([parameter], async_op=False)
        values = parameter.ds_tensor.data.clone()
        swapper.remove_partition_and_release_buffers([parameter])
        parameter.ds_tensor.data = values
        parameter.ds_tensor.final_location = None
        parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
