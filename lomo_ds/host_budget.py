"""Pinned host memory is a budget: what of it there is, and a sentence where it is not enough."""

from lomo_ds.errors import ConfigError

# What the ranks of a host may pin together; the rest stays with the operating system and the data loader.
HOST_SHARE = 0.8


def require_host_bytes(need: int, free: int, what: str, way_out: str) -> None:
    """Refuse to pin more than a host can spare.

    Args:
        need: bytes of a rank.
        free: of host memory for each rank, see ``memory.free_bytes``.

    Raises:
        ConfigError: it does not fit; the sentence says what is needed, what there is, and ``way_out``.
    """
    if need > HOST_SHARE * free:
        raise ConfigError(
            f"{what} needs {told(need)} of pinned host memory a rank, and of {told(free)} that are free for each rank "
            f"{told(int(HOST_SHARE * free))} may be pinned; {way_out}"
        )


def told(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
