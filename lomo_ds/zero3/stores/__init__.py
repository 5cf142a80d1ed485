"""Stores: where this rank's shards are kept between their uses."""

from lomo_ds.zero3.stores.device_store import OnDevice
from lomo_ds.zero3.stores.host_store import InHostMemory
from lomo_ds.zero3.stores.nvme_store import OnNvme
from lomo_ds.zero3.stores.store import Store

__all__ = ["InHostMemory", "OnDevice", "OnNvme", "Store"]
