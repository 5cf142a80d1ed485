"""Processes that die or are asked to stop: no rank hangs, one error is reported, and a restart loses nothing."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import RESTART, Job, demo_with_dropout, last_step, training_arguments, weights_of
from tests.limits import HUNG

STEPS = 12
SPARED = 70  # exit status of a rank whose peer has died


@pytest.fixture(scope="module")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_with_dropout(tmp_path_factory.mktemp("dropout"))


@pytest.fixture(scope="module")
def left_alone(dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("alone") / "out"
    job = Job(training_arguments(dropout, out, STEPS, "fp32"), 3, out.with_suffix(".log"))
    assert job.wait() == [0, 0, 0], job.log.read_text()
    return weights_of(out)


@pytest.fixture
def job(dropout: Path, tmp_path: Path) -> Iterator[Job]:
    """A job of three ranks in the midst of training."""
    started = Job(training_arguments(dropout, tmp_path / "out", STEPS, "fp32"), 3, tmp_path / "first.log")
    wait_for_step(started, tmp_path / "out", 3)
    yield started
    started.end()


def wait_for_step(job: Job, out: Path, step: int) -> None:
    deadline = time.monotonic() + HUNG
    while last_step(out) < step:
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.01)


def resumed(dropout: Path, tmp_path: Path) -> bytes:
    again = Job([*training_arguments(dropout, tmp_path / "out", STEPS, "fp32"), *RESTART], 3, tmp_path / "second.log")
    assert again.wait() == [0, 0, 0], again.log.read_text()
    assert "resumed after step " in again.log.read_text()
    return weights_of(tmp_path / "out")


@pytest.mark.parametrize("victim", [0, 2])
def test_when_one_rank_is_killed_the_others_say_so_and_end(
    job: Job, dropout: Path, tmp_path: Path, left_alone: bytes, victim: int
) -> None:
    job.signal(signal.SIGKILL, [victim])
    expected: list[int | None] = [SPARED] * 3
    expected[victim] = -signal.SIGKILL
    assert job.wait(timeout=30.0) == expected
    said = job.log.read_text()
    assert said.count("error: ") == 1
    assert f"error: rank {victim} (process " in said
    assert "has died, and training cannot go on without it; start again with --resume_from_checkpoint auto" in said
    assert "Traceback" not in said
    assert resumed(dropout, tmp_path) == left_alone


def test_a_defect_on_one_rank_shows_its_traceback_and_ends_all(job: Job) -> None:
    job.signal(signal.SIGINT, [1])  # KeyboardInterrupt, wherever the rank is
    statuses = job.wait(timeout=30.0)
    assert None not in statuses
    assert 0 not in statuses
    said = job.log.read_text()
    assert said.count("Traceback") >= 1
    assert "has died" not in said


def test_a_signal_to_one_rank_saves_and_ends_all_well(
    job: Job, dropout: Path, tmp_path: Path, left_alone: bytes
) -> None:
    job.signal(signal.SIGTERM, [1])
    assert job.wait(timeout=30.0) == [0, 0, 0]
    said = job.log.read_text()
    assert "stopped by a signal to another rank after step " in said
    assert "is saved; resume with --resume_from_checkpoint auto" in said
    assert resumed(dropout, tmp_path) == left_alone


# one process is enough for the signals themselves

STUCK = """
from lomo_ds.train.signals import StopRequest
import hashlib
with StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # in C, where no handler runs, as in a collective that hangs
"""


def test_the_second_signal_ends_a_process_that_is_stuck_in_c() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HUNG) == 128 + signal.SIGTERM


WAITS = """
import time
from lomo_ds.train.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while stop.name is None:
        time.sleep(0.01)
    print(stop.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(first: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n"
        process.send_signal(first)  # an echo of the same request, through a launcher
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HUNG) == 128 + signal.SIGTERM
