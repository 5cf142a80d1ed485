"""The machine that this process runs on, as far as it can be asked."""

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.planner.machine import WORKSPACE_BYTES, WORKSPACE_BYTES_OF_HOPPER, WORKSPACES, Machine

# Floating-point operations in a cycle of a multiprocessor's tensor cores, bf16 with fp32 sums, by compute capability
FLOPS_PER_CYCLE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
OF_A_CONSUMER_CARD = 512
NVME = 3e9  # bytes a second: no drive says what it can do, and this one reads and writes as PCIe 3.0 does


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
