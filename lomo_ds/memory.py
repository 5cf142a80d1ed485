"""How much memory is free, measured."""

import os

import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator


def free_bytes() -> tuple[int, int]:
    """Free bytes of this rank's device, and of host memory for each rank on this host."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    return _free_device_bytes(), psutil.virtual_memory().available // ranks_here


def _free_device_bytes() -> int:
    """What the driver has left, and what torch has reserved and does not use.

    On CUDA DeepSpeed's figure leaves out the latter, and fails where CUDA_VISIBLE_DEVICES holds UUIDs or names of MIG.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return int(accelerator.available_memory())
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
