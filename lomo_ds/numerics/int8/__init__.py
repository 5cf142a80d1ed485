"""Weights in eight bits: blocks of neighbours, each with codes from -127 to 127 and a scale that they are times of."""

from lomo_ds.numerics.int8.blocks import (
    Blocks,
    Values,
    blocks_in,
    buffer_of,
    bytes_of_buffer,
    bytes_of_scales,
    fill,
    fits,
    read,
    update,
)
from lomo_ds.numerics.int8.eager import BLOCK, Noise, blocks_of

__all__ = [
    "BLOCK",
    "Blocks",
    "Noise",
    "Values",
    "blocks_in",
    "blocks_of",
    "buffer_of",
    "bytes_of_buffer",
    "bytes_of_scales",
    "fill",
    "fits",
    "read",
    "update",
]
