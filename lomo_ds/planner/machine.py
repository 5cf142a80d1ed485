"""The machine of a run: memory, links and arithmetic, as given in words or as this process finds them."""

import re
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.errors import ConfigError

CONTEXT_BYTES = 768 * 2**20  # what CUDA and its libraries' kernels take of a card beside tensors
# torch allocates a workspace of cuBLAS for each thread that multiplies: forward's and backward's
WORKSPACES = 2
WORKSPACE_BYTES = 8320 * 2**10
WORKSPACE_BYTES_OF_HOPPER = 32 * 2**20
# Floating-point operations in a cycle of a multiprocessor's tensor cores, bf16 with fp32 sums, by compute capability
FLOPS_PER_CYCLE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
OF_A_CONSUMER_CARD = 512
NVME = 3e9  # bytes a second: no drive says what it can do, and this one reads and writes as PCIe 3.0 does
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Machine:
    """GPUs alike, and the hosts they are in.

    Attributes:
        gpu_memory: bytes of a GPU; ``host_memory``, of a host, which its ranks share.
        pcie: bytes a second between a GPU and its host, in either direction, both at once.
        gpu_link: bytes a second of a GPU to its peers; 0 where they are reached over ``pcie``.
        nvme: bytes a second that a host reads, and writes; 0 for none.
        flops: of a GPU in a second, as its maker states them for bf16 with fp32 sums.
        utilisation: share of them that matrix products of this size get.
        workspace: bytes of a GPU that cuBLAS works in.
        device: ``gpu``; ``cpu`` for ranks that compute on the host, as tests do.
    """

    gpu_memory: int = 24 * 2**30
    host_memory: int = 128 * 2**30
    pcie: float = 16e9
    gpu_link: float = 0.0
    nvme: float = 0.0
    flops: float = 71e12  # an RTX 3090
    utilisation: float = 0.5
    workspace: int = WORKSPACES * WORKSPACE_BYTES
    device: Literal["gpu", "cpu"] = "gpu"

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "host_memory", "pcie", "flops", "utilisation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.utilisation > 1:
            raise ConfigError(f"utilisation is a share of the GPU's flops, at most 1, got {self.utilisation}")

    @property
    def context(self) -> int:
        """Bytes of a GPU that no tensor gets."""
        return CONTEXT_BYTES if self.device == "gpu" else 0


def this_machine(ranks_here: int) -> Machine:
    """This rank's GPU and host; links and drive are assumed. Without a GPU ranks share the host's memory.

    Args:
        ranks_here: on this host.
    """
    host_memory = psutil.virtual_memory().total
    if get_accelerator().device_name() != "cuda":
        return Machine(host_memory // ranks_here, host_memory, nvme=NVME, device="cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    per_cycle = FLOPS_PER_CYCLE.get((found.major, found.minor), OF_A_CONSUMER_CARD)
    cycles = 1000.0 * getattr(found, "clock_rate", 1_700_000)  # stated in kHz
    flops = per_cycle * found.multi_processor_count * cycles
    workspace = WORKSPACES * (WORKSPACE_BYTES_OF_HOPPER if found.major == 9 else WORKSPACE_BYTES)
    return Machine(found.total_memory, host_memory, nvme=NVME, flops=flops, workspace=workspace)


def parse_bytes(text: str, name: str = "memory") -> int:
    """``24GB`` in bytes. Memory is sold in powers of 1024, so GB and GiB are the same here.

    Raises:
        ConfigError: it is no such thing.
    """
    return int(_parse(text, 1024, r"(?:i?B)?", name, "an amount of memory such as 24GB or 512MiB"))


def parse_rate(text: str, name: str = "rate") -> float:
    """``16GB/s`` in bytes a second. Links are sold in powers of 1000.

    Raises:
        ConfigError: it is no such thing.
    """
    return _parse(text, 1000, r"B/s", name, "a rate such as 16GB/s")


def _parse(text: str, base: int, unit: str, name: str, rule: str) -> float:
    found = re.fullmatch(rf"\s*(\d{{1,9}}(?:\.\d{{1,9}})?)\s*([KMGT]?){unit}\s*", text, re.IGNORECASE)
    value = float(found[1]) * base ** UNITS[found[2].upper()] if found else 0.0
    if not value:
        raise ConfigError(f"--{name} must be {rule}, got {text!r}")
    return value
