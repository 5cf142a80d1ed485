"""What ``PinnedMemory`` takes of a host for tensors that it cuts one after another."""

from lomo_ds.host_memory import Slabs


def pinned_bytes(sizes: list[int]) -> int:
    """Of tensors of ``sizes`` bytes, in their order: whole slabs."""
    slabs = Slabs(sum(sizes))
    for size in sizes:
        slabs.place(size)
    return sum(slabs.sizes)
