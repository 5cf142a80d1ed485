"""Stores: where this rank's shards are kept between their uses, and how they travel from there."""

from lomo_ds.stores.base import Store
from lomo_ds.stores.in_host_memory import InHostMemory
from lomo_ds.stores.on_device import OnDevice
from lomo_ds.stores.on_nvme import OnNvme
from lomo_ds.stores.wire import AsKept, Quantized

__all__ = ["AsKept", "InHostMemory", "OnDevice", "OnNvme", "Quantized", "Store"]
