"""Measurement of free memory, and the limit on pinned host memory."""

import psutil

from lomo_ds.distributed.device import free_device_bytes
from lomo_ds.distributed.process_group import ranks_on_host
from lomo_ds.errors import ConfigError

# Share of free host memory that all ranks of a host may pin; the rest is for the operating system and data loading.
HOST_SHARE = 0.8


def free_bytes() -> tuple[int, int]:
    """Return the free bytes of this rank's device, and the free bytes of host memory per rank on this host."""
    return free_device_bytes(), psutil.virtual_memory().available // ranks_on_host()


def check_host_memory(need: int, free: int, what: str, remedy: str) -> None:
    """Check that a rank may pin ``need`` bytes of host memory.

    Args:
        need: bytes per rank.
        free: free bytes of host memory per rank; see ``free_bytes``.
        what: the setting that needs the memory, for the error message.
        remedy: the end of the error message, which says what to change.

    Raises:
        ConfigError: host memory is too small.
    """
    if need > HOST_SHARE * free:
        raise ConfigError(
            f"{what} needs {format_bytes(need)} of pinned host memory a rank, and of {format_bytes(free)} that are "
            f"free for each rank {format_bytes(int(HOST_SHARE * free))} may be pinned; {remedy}"
        )


def format_bytes(count: int) -> str:
    """Return a number of bytes as text in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
