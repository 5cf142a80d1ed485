"""How much memory is free, measured."""

import os

import deepspeed.comm as dist
import psutil
from deepspeed.accelerator import get_accelerator


def free_bytes() -> tuple[int, int]:
    """Free bytes of this rank's device, and of host memory for each rank on this host."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    return int(get_accelerator().available_memory()), psutil.virtual_memory().available // ranks_here
