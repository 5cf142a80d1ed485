"""Triton kernel launches with little more host overhead than those of PyTorch's own kernels."""

from collections.abc import Hashable
from typing import Any


class Launcher:
    """Launches one kernel and caches its compiled variants.

    Triton looks up the variant from all arguments at each call, which takes five times as long as the launch itself. In
    a backward pass that launches an update for each parameter, the host would fall behind the device.

    Args:
        kernel: a function decorated with ``triton.jit``.
        options: compile options.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = options
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *arguments: Any) -> None:
        """Run ``grid`` programs on the current device and its current stream.

        Args:
            key: everything that the compiled variant depends on; see ``alignment`` for tensors.
            arguments: all arguments of the kernel, in order.
        """
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self.compiled[key] = compiled


def alignment(*addresses: int) -> tuple[bool, ...]:
    """Return whether each address is a multiple of 16 bytes, which Triton specializes kernels for."""
    return tuple(address % 16 == 0 for address in addresses)
