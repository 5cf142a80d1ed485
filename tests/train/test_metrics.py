"""Metrics of a run, with a GPU that NVML reports and without one."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lomo_ds.train import metrics
from lomo_ds.train.metrics import Monitor


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rank_0_writes_metrics(tmp_path: Path) -> None:
    with Monitor(tmp_path, rank=0) as reports:
        reports.log(3, {"loss": 2.5, "grad_norm": math.nan})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 3, "loss": 2.5, "grad_norm": None}, "each line is there at once, and JSON"
    assert scalars(tmp_path / "runs")["train/loss"] == [2.5]


def test_other_ranks_write_nothing_without_a_gpu(tmp_path: Path) -> None:
    with Monitor(tmp_path, rank=1) as reports:
        reports.log(3, {"loss": 2.5})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "folder"), [(0, "runs"), (1, "runs/rank1")])
def test_each_rank_reports_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, folder: str) -> None:
    monkeypatch.setattr(metrics, "_nvml_handle", lambda: "a handle")
    monkeypatch.setattr(metrics.pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=3 * 2**30))
    monkeypatch.setattr(metrics.pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=97))
    monkeypatch.setattr(metrics.pynvml, "nvmlDeviceGetPowerUsage", lambda gpu: 310_500)
    monkeypatch.setattr(metrics.torch.cuda, "max_memory_allocated", lambda: 2**30)
    with Monitor(tmp_path, rank) as reports:
        reports.log(1, {"loss": 2.5})
    actual = scalars(tmp_path / folder)
    assert actual["gpu/memory_used_gib"] == [3.0]
    assert actual["gpu/peak_allocated_gib"] == [1.0]
    assert actual["gpu/utilisation_percent"] == [97.0]
    assert actual["gpu/power_watts"] == [310.5]
    assert ("train/loss" in actual) == (rank == 0)
