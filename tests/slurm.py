"""A private SLURM: real daemons on this machine, pretending to be two nodes of two GPUs each, all in one folder."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.limits import HUNG

END_TIMEOUT = 60.0  # seconds that its daemons have to end before they are killed

# cred_expire is how long a requeued job is held back, by default two minutes; KillWait how long a cancelled job has to
# end. The nodes claim more CPUs than there are, so that there is room for every job.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
KillWait=1
MpiDefault=none
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1_port} CPUs=8 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2_port} CPUs=8 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""
GRES_CONF = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # devices that everyone has, and no rank opens


class Slurm:
    """A SLURM installation that a test starts."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, *command: str | Path) -> str:
        """Run one of SLURM's commands and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=HUNG)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of a job, such as JobState and Restarts."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)


@contextlib.contextmanager
def private_slurm(folder: Path) -> Iterator[Slurm]:
    """Start SLURM in ``folder``, and leave no process of it behind.

    Where it cannot run the test skips, but in CI it fails.
    """
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    if os.geteuid() != 0 or not all(shutil.which(program) for program in programs):
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("a private SLURM needs root, and slurm-wlm and munge installed")
    conf = folder / "slurm.conf"
    environment = os.environ | {"SLURM_CONF": str(conf)}
    slurm = Slurm(environment)
    ports = dict(zip(("controller_port", "node1_port", "node2_port"), _free_ports(3), strict=True))
    conf.write_text(SLURM_CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], **ports))
    (folder / "gres.conf").write_text(GRES_CONF)
    (folder / "munge.key").write_bytes(secrets.token_bytes(32))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir()
    daemons: list[subprocess.Popen[bytes]] = []
    munge_files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.out").open("w") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def is_ready() -> bool:
        command = ["sinfo", "--noheader", "--format=%T %D"]  # fails while there is nobody to ask
        return subprocess.run(command, env=environment, capture_output=True).stdout.split() == [b"idle", b"2"]

    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(_end_processes, str(conf), daemons)
        # --force: munged would rather not be root, nor keep its files where its own user cannot read them
        start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files)
        wait_for((folder / "munge.socket").exists, HUNG, folder / "munged.out")
        start("slurmctld", "slurmctld", "-D")
        for node in ("node1", "node2"):
            start(node, "slurmd", "-D", "-N", node)
        wait_for(is_ready, HUNG, folder / "slurmctld.out")
        at_the_end.callback(_end_jobs, slurm, folder / "slurmctld.out")
        yield slurm


def wait_for(condition: Callable[[], bool], timeout: float, log: Path) -> None:
    """Wait until ``condition`` holds; a failure shows the end of ``log``."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            output = log.read_text()[-5000:] if log.exists() else "no such file"
            pytest.fail(f"waited {timeout:.0f} s; the end of {log}:\n{output}")
        time.sleep(0.05)


def _end_jobs(slurm: Slurm, log: Path) -> None:
    """Cancel all jobs: the slurmstepd above each ends only while the daemons are there."""
    slurm.run("scancel", "--user=root")
    wait_for(lambda: slurm.run("squeue", "--noheader") == "", HUNG, log)


def _end_processes(conf: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End every process that has this SLURM_CONF in its environment: the daemons, and what is left of jobs."""
    own = list(_processes_of(conf))
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(own, END_TIMEOUT)
    while own := list(_processes_of(conf)):
        for process in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, 1.0)
    for daemon in daemons:
        daemon.wait()


def _processes_of(conf: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == conf:
                yield process


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
