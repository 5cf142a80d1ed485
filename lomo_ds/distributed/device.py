"""The device that a rank computes on, as DeepSpeed's accelerator names it."""

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


def compute_device() -> torch.device:
    """Return the device of this rank: ``cpu``, or ``cuda`` with its index."""
    return torch.device(get_accelerator().current_device_name())


def device_index() -> int:
    """Return the index of this rank's device; 0 for ``cpu``."""
    return get_accelerator().current_device() or 0


def set_device(index: int) -> None:
    """Make a device the current one of this thread; a new thread starts with device 0."""
    get_accelerator().set_device(index)


def free_device_bytes() -> int:
    """Return the bytes that the driver reports as free plus those that torch has reserved but does not use.

    On CUDA, DeepSpeed's figure omits the latter, and fails if CUDA_VISIBLE_DEVICES holds UUIDs or MIG names.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return int(accelerator.available_memory())
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def get_device_rng_state() -> Tensor:
    """Return the state of torch's generator on this rank's device."""
    return get_accelerator().get_rng_state()


def set_device_rng_state(state: Tensor) -> None:
    """Set the state of torch's generator on this rank's device."""
    get_accelerator().set_rng_state(state)
