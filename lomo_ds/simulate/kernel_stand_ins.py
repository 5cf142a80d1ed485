"""Stand-ins for this project's Triton kernels: they ask for the same work as the kernels do, and compute nothing."""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lomo_ds.numerics import apply
from lomo_ds.numerics.int8 import blocks
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.streams import Streams


class SimulatedKernels:
    """The functions of ``numerics.float_kernel`` and of ``numerics.int8.kernel``."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def update(self, weights: Tensor, direction: Tensor, *arguments: Any) -> None:
        """Read a direction and weights, and write the weights."""
        self._add("update", [weights, weights, direction])

    def update_blocks(self, codes: Tensor, scales: Tensor, direction: Tensor, *arguments: Any) -> None:
        """Read a direction, codes and scales, and write codes and scales."""
        self._add("update int8", [codes, codes, scales, scales, direction])

    def encode(self, values: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Read values, and write codes and scales."""
        self._add("quantize", [values, *out])

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Read codes and scales, and write values."""
        self._add("dequantize", [codes, scales, out])

    def _add(self, name: str, tensors: list[Tensor]) -> None:
        self.streams.current.add(name, Work(memory=sum(tensor.nbytes for tensor in tensors)))


def install_kernels(streams: Streams) -> None:
    """Use the stand-ins for tensors of the simulated GPU, for the rest of the process."""
    kernels = SimulatedKernels(streams)
    int8_kernels = SimpleNamespace(update=kernels.update_blocks, encode=kernels.encode, decode=kernels.decode)
    for module, stand_in in ((apply, kernels), (blocks, int8_kernels)):
        vars(module)["kernel_for"] = functools.partial(_kernel_for, stand_in)


def _kernel_for(stand_in: Any, device: torch.device) -> Any:
    return stand_in if device.type != "cpu" else None
