"""Launches of a Triton kernel that take the host little longer than those of PyTorch's own kernels."""

from collections.abc import Hashable
from typing import Any


class Launcher:
    """Launches one kernel, and remembers what it was compiled to.

    Triton finds that out at each call, from all arguments, which takes five times as long as the launch itself: in a
    backward pass that launches an update for each parameter the host would fall behind the device.

    Args:
        kernel: what ``triton.jit`` has made.
        options: of its compilation.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = options
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *arguments: Any) -> None:
        """Run ``grid`` programs on the current device and its current stream.

        Args:
            key: everything that the kernel is compiled for; see ``alignment`` for tensors.
            arguments: all of the kernel's, in order.
        """
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self.compiled[key] = compiled


def alignment(*addresses: int) -> tuple[bool, ...]:
    """What Triton compiles for of each address: whether it is a multiple of 16 bytes."""
    return tuple(address % 16 == 0 for address in addresses)
