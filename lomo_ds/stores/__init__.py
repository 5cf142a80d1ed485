"""Stores: where this rank's shards are kept between their uses, and in what form."""

from lomo_ds.stores.base import Store
from lomo_ds.stores.in_host_memory import FromHostMemory, InHostMemory
from lomo_ds.stores.on_device import OnDevice
from lomo_ds.stores.on_nvme import OnNvme

__all__ = ["FromHostMemory", "InHostMemory", "OnDevice", "OnNvme", "Store"]
