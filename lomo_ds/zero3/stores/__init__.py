"""Stores of this rank's shards: on the device, in host memory or on NVMe."""

from lomo_ds.zero3.stores.device_store import DeviceStore
from lomo_ds.zero3.stores.host_store import HostStore
from lomo_ds.zero3.stores.nvme_store import NvmeStore
from lomo_ds.zero3.stores.store import Store

__all__ = ["DeviceStore", "HostStore", "NvmeStore", "Store"]
