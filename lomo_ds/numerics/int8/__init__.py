"""Block-quantized eight-bit weights: a weight is its code (-127 to 127) times the scale of its block."""

from lomo_ds.numerics.int8.blocks import (
    Blocks,
    Values,
    dequantize,
    is_quantizable,
    quantize_flat,
    quantize_into,
    quantized_bytes,
    scale_bytes,
    update,
    view_blocks,
)
from lomo_ds.numerics.int8.eager import BLOCK, SMALLEST_SCALE, Noise, block_count

__all__ = [
    "BLOCK",
    "SMALLEST_SCALE",
    "Blocks",
    "Noise",
    "Values",
    "block_count",
    "dequantize",
    "is_quantizable",
    "quantize_flat",
    "quantize_into",
    "quantized_bytes",
    "scale_bytes",
    "update",
    "view_blocks",
]
