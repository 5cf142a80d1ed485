"""launch/slurm/ on a real SLURM, which pretends to have GPUs, with CPU ranks."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.limits import HUNG
from tests.slurm import Slurm, private_slurm, wait_for

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
STEPS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")  # as in an activated environment
        patch.setenv("OMP_NUM_THREADS", "1")
        with private_slurm(tmp_path_factory.mktemp("slurm")) as started:
            yield started


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder to submit from, where what the scripts write is not left behind."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@dataclass
class Job:
    """A submitted job, and the file that gets its output."""

    slurm: Slurm
    number: str
    log: Path

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, but no longer than the job lasts."""
        wait_for(lambda: condition() or self.is_over(), HUNG, self.log)
        assert condition(), self.log.read_text()

    def is_over(self) -> bool:
        return self.fields()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def is_completed(self) -> bool:
        return self.fields()["JobState"] == "COMPLETED"

    def restarts(self) -> int:
        return int(self.fields()["Restarts"])

    def fields(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def update(self, **fields: str) -> None:
        self.slurm.run("scontrol", "update", f"JobId={self.number}", *(f"{k}={v}" for k, v in fields.items()))

    def signal_ranks(self, name: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", f"{self.number}.0")


def submit(slurm: Slurm, script: str, repository: Path, options: list[str], arguments: list[str]) -> Job:
    log = repository / "job.log"
    command = ["sbatch", "--parsable", f"--chdir={repository}", f"--output={log}", *options]
    return Job(slurm, slurm.run(*command, ROOT / "launch/slurm" / script, *arguments).strip(), log)


def training(demo: Path, **more: Any) -> list[str]:
    arguments = {
        "model_name_or_path": demo / "model",
        "train_file": demo / "train.txt",
        "max_seq_length": 32,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.3,
        "logging_steps": 1,
    } | more
    return [f"--{name}={value}" for name, value in arguments.items()]


def test_a_job_at_its_time_limit_requeues_resumes_and_ends_as_if_never_stopped(
    slurm: Slurm, demo: Path, repository: Path, tmp_path: Path
) -> None:
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    metrics = out / "metrics.jsonl"
    arguments = training(demo, max_steps=STEPS, deepspeed="ds_configs/zero3_fp32.json")
    options = ["--gpus-per-node=2", "--signal=B:USR1@600"]
    job = submit(slurm, "single_node.sbatch", repository, options, [*arguments, f"--output_dir={out}"])

    # SLURM looks for jobs near their limit every 30 seconds. Until it has seen this one the ranks are held still, so
    # that the signal finds them in the midst of training, however fast the machine.
    job.wait_for(lambda: metrics.exists() and "loss" in metrics.read_text())
    job.signal_ranks("STOP")
    job.update(EndTime=(datetime.datetime.now() + datetime.timedelta(minutes=10)).isoformat(timespec="seconds"))
    launcher = ["torchrun", "--standalone", "--nproc_per_node=2", "launch/train.py"]
    subprocess.run([*launcher, *arguments, f"--output_dir={uninterrupted}"],
                   check=True, cwd=repository, env=slurm.environment, timeout=HUNG)  # fmt: skip
    job.wait_for(lambda: "its time is nearly up" in job.log.read_text())
    job.update(TimeLimit="60")  # minutes: the next run is not to be signalled
    job.signal_ranks("CONT")

    job.wait_for(lambda: job.restarts() == 1)
    stopped_at = [int(folder.name.removeprefix("checkpoint-")) for folder in out.glob("checkpoint-*")]
    assert len(stopped_at) == 1, job.log.read_text()
    assert 0 < stopped_at[0] < STEPS
    job.wait_for(job.is_completed)
    assert job.restarts() == 1

    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), "it resumed: no step was taken twice"
    resumed, expected = (load_file(folder / "model.safetensors") for folder in (out, uninterrupted))
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_several_nodes_are_one_job(slurm: Slurm, demo: Path, repository: Path) -> None:
    out = repository / "an output folder"
    arguments = training(demo, max_steps=2, output_dir=out)
    job = submit(slurm, "multi_node.sbatch", repository, ["--gpus-per-node=1"], arguments)
    job.wait_for(job.is_completed)
    assert "on 2 ranks" in job.log.read_text()
    assert (out / "model.safetensors").is_file()


def test_the_sweep_says_tokens_per_second(slurm: Slurm, demo: Path, repository: Path) -> None:
    options = ["--gpus-per-node=2", "--array=5"]
    job = submit(slurm, "sweep.sbatch", repository, options, training(demo, max_steps=2))
    job.wait_for(job.is_completed)
    combination, _, figure = job.log.read_text().splitlines()[-1].partition(": ")
    assert combination == "two_pass, 2 sequences per GPU, 2 GPUs"
    assert float(figure.removesuffix(" tokens per second")) > 0
