"""The job's process group: started however the job was launched, and left at its end."""

import os
import subprocess
from datetime import timedelta

import deepspeed
import deepspeed.comm as dist
from deepspeed.accelerator import get_accelerator

TIMEOUT = timedelta(hours=2)  # ranks wait in a collective while one tokenizes a corpus or writes a large model
RANK_ON_HOST = "LOMO_DS_RANK_ON_HOST"  # LOCAL_RANK as the launcher has set it
LONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def is_main_process() -> bool:
    """Whether this is the rank that talks to the user, known before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def is_local_main_process() -> bool:
    """Whether this is the rank that does what is needed once on each host."""
    return int(os.environ.get(RANK_ON_HOST) or os.environ["LOCAL_RANK"]) == 0


def ranks_on_host() -> int:
    """Return the number of ranks on this host, as the launcher has set it; without that, the world size.

    Before the process group starts, a process that no launcher started counts as one rank.
    """
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local_size or (dist.get_world_size() if dist.is_initialized() else 1))


def start_process_group() -> bool:
    """Join the job's process group, however it was launched: deepspeed, torchrun, srun, or one plain process.

    Returns:
        False if this process was in it already.
    """
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ:
        found = _slurm_environment() if "SLURM_STEP_NUM_TASKS" in os.environ else LONE_PROCESS
        os.environ |= found | {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    os.environ[RANK_ON_HOST] = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(_device_index())  # which is what DeepSpeed takes it for
    get_accelerator().set_device(_device_index())  # before any collective, which runs there
    _leave_out_inference_op()
    dist.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=TIMEOUT,
    )
    return True


def _device_index() -> int:
    """Of this rank's device among those that it sees: of one that it alone sees (``srun --gpus-per-task=1``), 0."""
    accelerator = get_accelerator()
    alone = accelerator.device_name() != "cpu" and accelerator.device_count() == 1
    return 0 if alone else int(os.environ["LOCAL_RANK"])


def _leave_out_inference_op() -> None:
    """On CPU ranks DeepSpeed would first compile an op that only inference uses.

    That takes a compiler, half a minute, and a lock file which outlives a killed process and stops every later one.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def stop_process_group() -> None:
    """Leave the process group; without this a rank can abort while the interpreter exits."""
    dist.destroy_process_group()


def _slurm_environment() -> dict[str, str]:
    """torch.distributed's variables from those that srun sets for each task of a step."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": hosts[0],
        # jobs that share a node must not share a port
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }
