"""Reading of a shard's values in fp32, whatever format they are stored in."""

import torch
from torch import Tensor

from lomo_ds.numerics import flat, int8
from lomo_ds.numerics.int8 import Values


def numel_of(values: Values) -> int:
    """Return the number of weights."""
    return (values if isinstance(values, Tensor) else values.codes).numel()


def device_of(values: Values) -> torch.device:
    """Return the device that the weights are on."""
    return (values if isinstance(values, Tensor) else values.codes).device


def piece_numel(device: torch.device) -> int:
    """Return the most elements to compute with at once on ``device``, see ``piece_numel_on``."""
    return piece_numel_on(device.type)


def piece_numel_on(device_type: str) -> int:
    """Return the most elements to compute with at once, which bounds temporaries; a multiple of ``int8.BLOCK``.

    Args:
        device_type: ``cpu``, or anything else for a GPU.
    """
    limit = flat.CPU_PIECE_NUMEL if device_type == "cpu" else flat.GPU_PIECE_NUMEL
    return limit - limit % int8.BLOCK


def part_of(values: Values, start: int, stop: int) -> Values:
    """Return a view of the weights [start, stop); ``start`` is a multiple of ``int8.BLOCK``."""
    return values[start:stop] if isinstance(values, Tensor) else values.part(start, stop)


def read(values: Values) -> Tensor:
    """Return the weights in fp32: a copy, or the tensor itself if it is fp32."""
    if isinstance(values, Tensor):
        return values.float()
    out = torch.empty_like(values.codes, dtype=torch.float32)
    int8.dequantize(values, out)
    return out


def squared_norm(values: Values) -> Tensor:
    """Return the sum of squares as a 0-dim fp32 tensor, without a copy larger than a piece."""
    total = torch.zeros((), dtype=torch.float32, device=device_of(values))
    numel, step = numel_of(values), piece_numel(device_of(values))
    for start in range(0, numel, step):
        exact = read(part_of(values, start, min(start + step, numel)))
        total += torch.dot(exact, exact)
    return total
