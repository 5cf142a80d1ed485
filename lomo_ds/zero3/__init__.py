"""Where the bytes are: the only package that reads or writes DeepSpeed's ``ds_*`` attributes of a parameter.

ZeRO-3 keeps each parameter as ``world size`` partitions of ceil(numel / world size) elements, one on each
rank, and gathers the whole of it around the modules that use it. A ``Shard`` is this rank's partition without
its padding, of floats or, where the DeepSpeed config says ``weights: int8``, of eight-bit weights; in memory or in a
file on NVMe. Writing to it changes the model; a gathered copy made before the write is stale from then on, so
``Gathering.refresh`` ends every step.
"""

from lomo_ds.zero3.ahead import Ahead
from lomo_ds.zero3.linear import keep_no_weights, linear
from lomo_ds.zero3.nvme import SwapSlot
from lomo_ds.zero3.nvme_settings import refuse_nvme_that_cannot_be
from lomo_ds.zero3.persistent import PersistentCopies
from lomo_ds.zero3.shard import SCALES, Shard, as_floats, kept_tensors, names_in_eight_bits, shards, whole_shape
from lomo_ds.zero3.split import (
    gathered,
    is_resident,
    is_resident_config,
    keeps_eight_bits,
    offload_device,
    partition,
    restore_full_params,
    split,
)
from lomo_ds.zero3.transport import Wire, forget_unregistered, gather_by, gather_within, lay_out

__all__ = [
    "SCALES",
    "Ahead",
    "PersistentCopies",
    "Shard",
    "SwapSlot",
    "Wire",
    "as_floats",
    "forget_unregistered",
    "gather_by",
    "gather_within",
    "gathered",
    "is_resident",
    "is_resident_config",
    "keep_no_weights",
    "keeps_eight_bits",
    "kept_tensors",
    "lay_out",
    "linear",
    "names_in_eight_bits",
    "offload_device",
    "partition",
    "refuse_nvme_that_cannot_be",
    "restore_full_params",
    "shards",
    "split",
    "whole_shape",
]
