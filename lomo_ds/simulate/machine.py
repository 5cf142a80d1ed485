"""The machine of a run: memory, links and arithmetic, as stated by the user or detected by this process."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from lomo_ds.distributed.device import compute_device
from lomo_ds.errors import ConfigError

CONTEXT_BYTES = 768 * 2**20  # GPU memory of CUDA and its libraries' kernels, beside tensors
# torch allocates a cuBLAS workspace for each thread that multiplies: that of forward and that of backward
WORKSPACES = 2
WORKSPACE_BYTES = 8320 * 2**10
HOPPER_WORKSPACE_BYTES = 32 * 2**20
# Floating-point operations per cycle and multiprocessor, bf16 with fp32 sums, by compute capability
FLOPS_PER_CYCLE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
CONSUMER_FLOPS_PER_CYCLE = 512
NVME = 3e9  # bytes per second of a PCIe 3.0 drive; assumed, because a drive does not report its speed
# Share of the peak that matrix products reach. Measured on an H100, beside kernels that are bound by memory: with 0.6
# to 0.63 the timeline takes as long as steps of 7B, 13B and 30B did (docs/planner.md)
UTILISATION = 0.6
MEMORY_BANDWIDTH = 936e9  # of an RTX 3090
KERNEL_SECONDS = 3e-6  # of the shortest kernel
COPY_SECONDS = 10e-6  # from the start of a copy between host and GPU to its first byte
COLLECTIVE_SECONDS = 30e-6  # the same of a collective
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Machine:
    """Identical GPUs, and the hosts that contain them.

    Attributes:
        gpu_memory: bytes of a GPU; ``host_memory``, bytes of a host, shared by its ranks.
        pcie: bytes per second between a GPU and its host, in each direction at the same time.
        gpu_link: bytes per second from a GPU to its peers; 0 if they communicate over ``pcie``.
        nvme: bytes per second that a host reads or writes; 0 for no disk.
        flops: floating-point operations per second of a GPU, as its maker states them for bf16 with fp32 sums.
        utilisation: fraction of ``flops`` that matrix products reach by themselves.
        memory_bandwidth: bytes per second of GPU memory.
        launch_seconds: time the host takes to run Python and launch one kernel.
        workspace: bytes of the cuBLAS workspaces of a GPU.
        device: ``gpu``; ``cpu`` for ranks that compute on the host, as in tests.
    """

    gpu_memory: int = 24 * 2**30
    host_memory: int = 128 * 2**30
    pcie: float = 16e9
    gpu_link: float = 0.0
    nvme: float = 0.0
    flops: float = 71e12  # an RTX 3090
    utilisation: float = UTILISATION
    memory_bandwidth: float = MEMORY_BANDWIDTH
    launch_seconds: float = 40e-6
    workspace: int = WORKSPACES * WORKSPACE_BYTES
    device: Literal["gpu", "cpu"] = "gpu"

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "host_memory", "pcie", "flops", "utilisation", "memory_bandwidth", "launch_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.utilisation > 1:
            raise ConfigError(f"utilisation is a fraction of the GPU's flops, at most 1, got {self.utilisation}")

    def kernel_seconds(self, flops: int, memory: int) -> float:
        """Return the seconds of a kernel with so many floating-point operations and so many bytes of GPU memory."""
        arithmetic = flops / (self.flops * self.utilisation)
        return max(arithmetic, memory / self.memory_bandwidth, KERNEL_SECONDS)

    @property
    def context(self) -> int:
        """Bytes of a GPU that are not available to tensors."""
        return CONTEXT_BYTES if self.device == "gpu" else 0


def detect_machine(ranks_on_host: int) -> Machine:
    """Detect this rank's GPU and host, and assume its links and disk.

    Args:
        ranks_on_host: number of ranks on this host. Without GPUs they share its memory.
    """
    host_memory = psutil.virtual_memory().total
    if compute_device().type != "cuda":
        return Machine(host_memory // ranks_on_host, host_memory, nvme=NVME, device="cpu")
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    per_cycle = FLOPS_PER_CYCLE.get((gpu.major, gpu.minor), CONSUMER_FLOPS_PER_CYCLE)
    cycles = 1000.0 * getattr(gpu, "clock_rate", 1_700_000)  # stated in kHz
    flops = per_cycle * gpu.multi_processor_count * cycles
    workspace = WORKSPACES * (HOPPER_WORKSPACE_BYTES if gpu.major == 9 else WORKSPACE_BYTES)
    return Machine(
        gpu.total_memory,
        host_memory,
        nvme=NVME,
        flops=flops,
        memory_bandwidth=_memory_bandwidth(gpu),
        workspace=workspace,
    )


def _memory_bandwidth(gpu: Any) -> float:
    """Return the bytes per second of a GPU's memory, which older versions of torch do not state."""
    kilohertz, bits = getattr(gpu, "memory_clock_rate", 0), getattr(gpu, "memory_bus_width", 0)
    return 2 * 1000.0 * kilohertz * bits / 8 or MEMORY_BANDWIDTH  # two transfers a cycle


def parse_bytes(text: str, name: str = "memory") -> int:
    """Parse an amount of memory such as ``24GB``. Memory is sold in powers of 1024, so GB and GiB are the same here.

    Raises:
        ConfigError: ``text`` is not an amount of memory.
    """
    return int(_parse(text, 1024, r"(?:i?B)?", name, "an amount of memory such as 24GB or 512MiB"))


def parse_rate(text: str, name: str = "rate") -> float:
    """Parse a rate such as ``16GB/s``. Links are sold in powers of 1000.

    Raises:
        ConfigError: ``text`` is not a rate.
    """
    return _parse(text, 1000, r"B/s", name, "a rate such as 16GB/s")


def _parse(text: str, base: int, unit: str, name: str, rule: str) -> float:
    match = re.fullmatch(rf"\s*(\d{{1,9}}(?:\.\d{{1,9}})?)\s*([KMGT]?){unit}\s*", text, re.IGNORECASE)
    value = float(match[1]) * base ** UNITS[match[2].upper()] if match else 0.0
    if not value:
        raise ConfigError(f"--{name} must be {rule}, got {text!r}")
    return value
