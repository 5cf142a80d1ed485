"""Start and end of the process group, for every way to launch a job."""

import os
import re
import subprocess
from datetime import timedelta

import deepspeed
import deepspeed.comm as dist
from deepspeed.accelerator import get_accelerator

TIMEOUT = timedelta(hours=2)  # ranks wait in a collective while one rank tokenizes a corpus or writes a large model
RANK_ON_HOST = "LOMO_DS_RANK_ON_HOST"  # environment variable: LOCAL_RANK as the launcher has set it
SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def is_main_process() -> bool:
    """Return whether this rank reports to the user; works before the process group starts."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def is_local_main_process() -> bool:
    """Return whether this rank does the work that is needed once per host."""
    return int(os.environ.get(RANK_ON_HOST) or os.environ["LOCAL_RANK"]) == 0


def ranks_on_host() -> int:
    """Return the number of ranks on this host, as the launcher has set it; without that, the world size.

    Before the process group starts, a process that no launcher started counts as one rank.
    """
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local_size or (dist.get_world_size() if dist.is_initialized() else 1))


def start_process_group() -> bool:
    """Join the process group of a job launched by deepspeed, torchrun, srun, or as a single plain process.

    Returns:
        False if this process had already joined.
    """
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ:
        launched = _slurm_environment() if "SLURM_STEP_NUM_TASKS" in os.environ else SINGLE_PROCESS
        os.environ |= launched | {
            name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ
        }
    os.environ[RANK_ON_HOST] = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(_device_index())  # DeepSpeed reads it as the device index
    get_accelerator().set_device(_device_index())  # before any collective, which would use the current device
    _skip_inference_op()
    dist.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=TIMEOUT,
    )
    return True


def _device_index() -> int:
    """Return the index of this rank's device; 0 if the process sees only one GPU (``srun --gpus-per-task=1``)."""
    accelerator = get_accelerator()
    single_gpu = accelerator.device_name() != "cpu" and accelerator.device_count() == 1
    return 0 if single_gpu else int(os.environ["LOCAL_RANK"])


def _skip_inference_op() -> None:
    """Keep DeepSpeed from compiling an op on CPU ranks that only inference uses.

    Compilation needs a compiler and half a minute; its lock file survives a killed process and blocks later ones.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def stop_process_group() -> None:
    """Leave the process group; otherwise a rank can abort while the interpreter exits."""
    dist.destroy_process_group()


def _slurm_environment() -> dict[str, str]:
    """Return the variables that torch.distributed reads, from those that srun sets for each task."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    local_size = tasks_on_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"]))
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": hosts[0],
        # jobs that share a node must not share a port
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Return the number of tasks on one node of a SLURM step.

    Args:
        tasks_per_node: counts in the order of the nodes, repeated ones shortened: ``8(x2),4`` is 8, 8 and 4.
    """
    counts = [
        int(count)
        for count, repetitions in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
        for _ in range(int(repetitions or 1))
    ]
    return counts[node]
