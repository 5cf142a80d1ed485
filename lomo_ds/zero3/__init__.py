"""ZeRO-3 partitioning: the only package that reads or writes the ``ds_*`` attributes that DeepSpeed adds.

ZeRO-3 stores each parameter as ``world size`` partitions of ceil(numel / world size) elements, one per rank, and
gathers the full parameter around the modules that use it. A ``Shard`` is this rank's partition without padding: floats,
or eight-bit weights if the DeepSpeed config says ``weights: int8``; in memory or in a file on NVMe. Writing to a shard
changes the model and makes earlier gathered copies stale, so ``Gathering.refresh`` ends every step.
"""

from lomo_ds.zero3.linear import deepspeed_linear, install_memory_efficient_linear, linear
from lomo_ds.zero3.lookahead import LookaheadLimit
from lomo_ds.zero3.nvme import SwapSlot
from lomo_ds.zero3.nvme_settings import default_pieces, validate_nvme
from lomo_ds.zero3.persistent import PersistentCopies
from lomo_ds.zero3.shard import SCALES, Shard, dequantize_parameter, full_shape, quantized_names, shards, stored_tensors
from lomo_ds.zero3.split import (
    gathered,
    is_resident,
    is_resident_config,
    offload_device,
    partition,
    restore_full_params,
    split,
    uses_int8_weights,
)
from lomo_ds.zero3.transport import (
    WireFormat,
    aligned_layout,
    gather_batches,
    install_gathering,
    reset_unregistered_gathers,
)

__all__ = [
    "SCALES",
    "LookaheadLimit",
    "PersistentCopies",
    "Shard",
    "SwapSlot",
    "WireFormat",
    "aligned_layout",
    "deepspeed_linear",
    "default_pieces",
    "dequantize_parameter",
    "full_shape",
    "gather_batches",
    "gathered",
    "install_gathering",
    "install_memory_efficient_linear",
    "is_resident",
    "is_resident_config",
    "linear",
    "offload_device",
    "partition",
    "quantized_names",
    "reset_unregistered_gathers",
    "restore_full_params",
    "shards",
    "split",
    "stored_tensors",
    "uses_int8_weights",
    "validate_nvme",
]
