"""``launch/plan.py --timeline``: what it prints and writes, and what it refuses before it simulates anything."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lomo_ds.errors import ConfigError
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.command import main
from lomo_ds.planner.timeline_report import SimulatedPlan
from tests.launching import ROOT
from tests.limits import HUNG
from tests.simulate.handmade import copies_and_kernels

JOB = ["--model_name_or_path=40m", "--max_seq_length=128", "--per_device_train_batch_size=1", "--max_grad_norm=0"]


@pytest.fixture(scope="module")
def simulated() -> SimulatedPlan:
    """A plan with a handmade timeline."""
    settings = Settings(sequence=128, gradient_clipping=0.0, gpus=2)
    return SimulatedPlan(plan_run(PlannedModel.load("40m"), settings, Machine()), copies_and_kernels())


def test_a_report_names_lanes_waits_and_stalls(simulated: SimulatedPlan) -> None:
    seconds = simulated.timeline.seconds
    lines = str(simulated).splitlines()
    assert lines[0] == "timeline of the plan"
    assert lines[1].startswith(f"  40m on 2 GPUs, 1 x 128: {seconds:.3g} s a step, ")
    assert f"  link up                 6.0000{100 * 6 / seconds:>11.1f} %" in lines
    assert any(line.startswith(f"{seconds:.3g} s by timeline, ") for line in lines)
    assert "compute waits: 5 s for link up, 2 s for the end of the step" in lines
    assert lines[lines.index("longest stalls of link up") + 1].startswith("  3 s, once: has nothing left to do")


def test_rates_of_a_report_are_those_of_the_timeline(simulated: SimulatedPlan) -> None:
    seconds, numel = simulated.timeline.seconds, simulated.plan.numel
    report = simulated.as_dict()
    assert report["tokens_per_second"] == pytest.approx(2 * 128 / seconds)
    assert report["model_tflops_per_gpu"] == pytest.approx(6 * numel * 128 / seconds / 1e12)
    assert report["planned_seconds"] == simulated.plan.time.total


def test_the_timeline_of_a_job_is_printed_and_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "step.png"
    command = [sys.executable, str(ROOT / "launch/plan.py"), *JOB, "--json", f"--timeline={picture}"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == ["simulating a step of 40m, which takes from seconds to minutes"]
    report = json.loads(run.stdout)["timeline"]
    assert report["is_suggestion"] is False
    assert report["lanes"]["compute"]["busy_share"] == pytest.approx(
        report["lanes"]["compute"]["busy_seconds"] / report["seconds"]
    )
    assert len(report["longest_stalls"]) == 3
    assert all(".py:" in stall["source"] for stall in report["longest_stalls"])
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    busy = sum(event["dur"] for event in events if event.get("cat") == "busy" and event["tid"] == 0)
    assert busy == pytest.approx(1e6 * report["lanes"]["compute"]["busy_seconds"], rel=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--timeline=step.svg"], "--timeline must name a PNG file such as timeline.png, got 'step.svg'"),
        (["--timeline=missing/step.png"], "in an existing folder, got 'missing/step.png'; create the folder missing"),
        (["--timeline=step.png", "--moments"], "--moments prints no plan"),
        (["--timeline=step.png", "--suggest=step.json"], "would both write step.json; give one of them another name"),
        (["--timeline=step.png", "--optim=adamw"], "leave --optim out"),
    ],
)
def test_a_timeline_is_refused_before_anything_is_simulated(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_to_simulate: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        main([*JOB, *argv])
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_timeline_is_refused(refuse_to_simulate: Any) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError, match="matplotlib"):
        main([*JOB, "--timeline=step.png"])


@pytest.fixture
def refuse_to_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a step was simulated")

    monkeypatch.setattr("lomo_ds.planner.simulated_step.record_step", fail)
