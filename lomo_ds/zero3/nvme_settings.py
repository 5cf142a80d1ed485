"""NVMe offload settings of a DeepSpeed config, and their validation before anything is allocated."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

from lomo_ds.errors import ConfigError
from lomo_ds.numerics.flat import ceil_div

PAGE_BYTES = 4096  # alignment that O_DIRECT may require of offsets, lengths and memory
# Bytes of the pieces that larger buffers are divided into: some milliseconds of a drive. A power of two, as torch pins.
LARGEST_PIECE = 2**25


@dataclass(frozen=True)
class NvmeSettings:
    """Location of the swap file, and parameters of its I/O.

    Attributes:
        path: folder of the file.
        block_size: bytes of one I/O request; smaller shards stay in host memory.
        requests_at_once: maximum number of concurrent I/O requests.
        buffer_bytes: maximum size of each buffer; larger ones than ``LARGEST_PIECE`` are divided into pieces.
        buffer_count: maximum number of buffers.
    """

    path: Path
    block_size: int
    requests_at_once: int
    buffer_bytes: int
    buffer_count: int

    @property
    def piece_bytes(self) -> int:
        """Most bytes that are transferred at once."""
        return _pieces(self.buffer_count, self.buffer_bytes)[1]

    @property
    def piece_count(self) -> int:
        """Number of pieces in all buffers."""
        return _pieces(self.buffer_count, self.buffer_bytes)[0]

    def aligned(self, nbytes: int) -> int:
        """Return ``nbytes`` rounded up to whole pages, which O_DIRECT transfers."""
        return ceil_div(nbytes, PAGE_BYTES) * PAGE_BYTES


def _pieces(buffer_count: int, buffer_bytes: int) -> tuple[int, int]:
    """Return number and bytes of the pieces, of whole pages, that the memory of all buffers is divided into."""
    piece_bytes = min(buffer_bytes // PAGE_BYTES * PAGE_BYTES, LARGEST_PIECE)
    return buffer_count * buffer_bytes // max(piece_bytes, 1), piece_bytes


def default_pieces(itemsize: int) -> tuple[int, int]:
    """Return number and bytes of the pieces of DeepSpeed's default buffers between NVMe and GPU."""
    defaults = DeepSpeedZeroOffloadParamConfig()
    return _pieces(defaults.buffer_count, defaults.buffer_size * itemsize)


def nvme_settings(ds_config: dict[str, Any], itemsize: int) -> NvmeSettings:
    """Return the settings of a ``ds_config`` with ``offload_param.device`` nvme.

    Args:
        itemsize: bytes of a parameter element.

    Raises:
        ConfigError: a setting is missing or invalid.
    """
    offload = DeepSpeedZeroOffloadParamConfig(**ds_config["zero_optimization"]["offload_param"])
    if offload.nvme_path is None:
        raise ConfigError(
            "zero_optimization.offload_param.device nvme needs a folder for the parameters; give one on the drive "
            "with offload_param.nvme_path"
        )
    aio = get_aio_config(ds_config)
    if aio["use_gds"]:
        raise ConfigError("aio.use_gds is not supported, because parameters pass through host memory; remove it")
    for name, step in (("block_size", PAGE_BYTES), ("queue_depth", 1), ("intra_op_parallelism", 1)):
        value = aio[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % step or value >= 2**31:
            rule = f"a multiple of {step}" if step > 1 else "a whole number of at least 1"
            raise ConfigError(f"aio.{name} must be {rule}, got {value!r}")
    if offload.buffer_count < 2:
        raise ConfigError(f"offload_param.buffer_count must be at least 2 for nvme, got {offload.buffer_count}")
    settings = NvmeSettings(
        path=Path(offload.nvme_path),
        block_size=aio["block_size"],
        requests_at_once=aio["queue_depth"] * aio["intra_op_parallelism"],
        buffer_bytes=offload.buffer_size * itemsize,
        buffer_count=offload.buffer_count,
    )
    if settings.piece_bytes < 1:
        raise ConfigError(
            f"offload_param.buffer_size must be at least {PAGE_BYTES // itemsize} elements, which are a page, got "
            f"{offload.buffer_size}; leave it out"
        )
    return settings


def validate_nvme(ds_config: dict[str, Any], itemsize: int) -> None:
    """Check that this machine supports the ``offload_param.device nvme`` settings.

    Raises:
        ConfigError: a setting is invalid, or ``nvme_path`` does not support O_DIRECT.
    """
    settings = nvme_settings(ds_config, itemsize)
    if not settings.path.is_dir():
        raise ConfigError(
            f"offload_param.nvme_path must be a folder on an NVMe drive, got {settings.path}, which is not a folder; "
            "create it, or give another one"
        )
    os.close(nameless_file(settings.path))


def nameless_file(folder: Path) -> int:
    """Return a descriptor of a new unnamed file, opened with O_DIRECT, that is deleted when closed.

    Raises:
        ConfigError: ``folder`` does not allow it.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix="lomo_ds-", dir=folder)
        os.close(descriptor)
        try:
            return os.open(name, os.O_RDWR | os.O_DIRECT)
        finally:
            Path(name).unlink()
    except OSError as error:
        raise ConfigError(
            f"offload_param.nvme_path {folder} cannot be used: {error.strerror}; give a folder that can be "
            "written to past the page cache (O_DIRECT)"
        ) from None
