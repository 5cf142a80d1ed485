"""Moves of partitions between memory and the NVMe swap file, also of those that DeepSpeed has swapped out."""

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
    """Return the swap space that ``parameters`` already use, or a new one."""
    slots = [slot for slot in map(slot_of, parameters) if slot is not None]
    return slots[0].space if slots else SwapSpace(nvme_settings(ds_config, dtype.itemsize), device)


def move_to_nvme(parameter: Partitioned, space: SwapSpace) -> None:
    """Move a partition to the swap file and free its memory, unless it is there already; pin one that is too small."""
    if slot_of(parameter) is not None:
        return
    _reclaim_from_deepspeed(parameter)
    parameter.ds_tensor.swap_slot = None
    partition = parameter.ds_tensor
    if space.accepts(partition.ds_numel * partition.element_size()):
        slot = space.allocate_slot(partition.ds_numel, partition.dtype)
        slot.write(partition.data)
        partition.swap_slot = slot
        partition.data = partition.new_empty(0)
    elif space.device.type != "cpu" and not partition.is_pinned():
        partition.data = space.pin(partition.data)


def move_to_memory(parameters: Iterable[Partitioned]) -> None:
    """Move every partition in the swap file to host memory."""
    for parameter in parameters:
        slot = slot_of(parameter)
        if slot is not None:
            parameter.ds_tensor.data = slot.read(slot.numel)
            parameter.ds_tensor.swap_slot = None


def _reclaim_from_deepspeed(parameter: Partitioned) -> None:
    """Read a partition that ``deepspeed.zero.Init`` has swapped out back into host memory."""
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
