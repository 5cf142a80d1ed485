"""The device that a rank computes on, as DeepSpeed's accelerator names it."""

import torch
from deepspeed.accelerator import get_accelerator


def compute_device() -> torch.device:
    """Return the device of this rank, ``cpu`` or ``cuda`` with its index."""
    return torch.device(get_accelerator().current_device_name())
