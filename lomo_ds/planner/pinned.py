"""What ``PinnedMemory`` takes of a host for tensors that it cuts one after another."""

from collections.abc import Iterable

from lomo_ds.host_memory import ALIGNMENT, FIRST_SLAB_BYTES, SLAB_BYTES


def pinned_bytes(sizes: Iterable[int], pinned: bool) -> int:
    """Of tensors of ``sizes`` bytes, in their order: whole slabs; torch pins powers of two.

    Args:
        pinned: False on the CPU, where memory is ordinary.
    """
    left, next_bytes, total = 0, FIRST_SLAB_BYTES, 0
    for size in sizes:
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if left < taken:
            left = max(next_bytes, taken)
            total += 1 << (left - 1).bit_length() if pinned else left
            next_bytes = min(2 * next_bytes, SLAB_BYTES)
        left -= taken
    return total
