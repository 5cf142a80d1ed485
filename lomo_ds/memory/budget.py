"""Free memory, measured; and the pinned host memory that may be taken of it."""

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.distributed.process_group import ranks_on_host
from lomo_ds.errors import ConfigError

# What the ranks of a host may pin together; the rest stays with the operating system and the data loader.
HOST_SHARE = 0.8


def free_bytes() -> tuple[int, int]:
    """Free bytes of this rank's device, and of host memory for each rank on this host."""
    return _free_device_bytes(), psutil.virtual_memory().available // ranks_on_host()


def _free_device_bytes() -> int:
    """What the driver has left, and what torch has reserved and does not use.

    On CUDA DeepSpeed's figure leaves out the latter, and fails where CUDA_VISIBLE_DEVICES holds UUIDs or names of MIG.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return int(accelerator.available_memory())
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def check_host_memory(need: int, free: int, what: str, remedy: str) -> None:
    """Refuse to pin more than a host can spare.

    Args:
        need: bytes of a rank.
        free: of host memory for each rank, see ``free_bytes``.

    Raises:
        ConfigError: it does not fit; the sentence says what is needed, what there is, and ``remedy``.
    """
    if need > HOST_SHARE * free:
        raise ConfigError(
            f"{what} needs {format_bytes(need)} of pinned host memory a rank, and of {format_bytes(free)} that are "
            f"free for each rank {format_bytes(int(HOST_SHARE * free))} may be pinned; {remedy}"
        )


def format_bytes(count: int) -> str:
    """Return a number of bytes as text in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
