"""Metrics of a run: metrics.jsonl, what trackers get, and the memory, utilisation and power of each GPU."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import pynvml
import torch

from lomo_ds.train.trackers import TensorBoard, Tracker, Wandb, trainer_names

logger = logging.getLogger(__name__)


class Monitor:
    """Writes one record per logged step: training metrics on rank 0, GPU metrics on every rank.

    Files in ``output_dir``: ``metrics.jsonl``, one object per record; ``runs/`` for TensorBoard, with
    subfolders ``rank1``, ``rank2`` and so on for the GPUs of the other ranks; ``wandb/``, for rank 0.

    Args:
        step: the step to resume after; later records are dropped, since these steps are repeated. 0 drops all.
        report_to: the trackers, ``tensorboard`` and ``wandb``.
        settings: the run's arguments, for trackers that show them.

    Raises:
        ConfigError: a tracker cannot be started.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        step: int = 0,
        report_to: tuple[str, ...] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.gpu = _nvml_handle()
        runs = output_dir / "runs"
        self.trackers: list[Tracker] = []
        if "tensorboard" in report_to and (rank == 0 or self.gpu is not None):
            self.trackers.append(TensorBoard(runs if rank == 0 else runs / f"rank{rank}", step))
        if "wandb" in report_to and rank == 0:
            self.trackers.append(Wandb(output_dir, settings or {}, step))
        self.file = _open_records(output_dir / "metrics.jsonl", step) if rank == 0 else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tracker in self.trackers:
            with contextlib.suppress(OSError):  # a failed write was logged before
                tracker.close(failed=error is not None)
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` of ``step``; ranks other than 0 record only the metrics of their GPU.

        A failed write, on a full disk for example, is logged and does not end the run.
        """
        try:
            self._write(step, metrics)
        except OSError as error:
            logger.warning("step %d could not be recorded: %s", step, error.strerror)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        if self.trackers:
            recorded = (trainer_names(metrics) if self.file is not None else {}) | self._gpu_metrics()
            for tracker in self.trackers:
                tracker.log(step, recorded)

    def _gpu_metrics(self) -> dict[str, float]:
        if self.gpu is None:
            return {}
        readings: dict[str, Callable[[], float]] = {
            "gpu/memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(self.gpu).used / 2**30,
            "gpu/peak_allocated_gib": lambda: torch.cuda.max_memory_allocated() / 2**30,
            "gpu/utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(self.gpu).gpu,
            "gpu/power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(self.gpu) / 1000,
        }
        metrics = {}
        for name, read in readings.items():
            with contextlib.suppress(pynvml.NVMLError):  # some readings are unavailable on a shared GPU
                metrics[name] = float(read())
        return metrics


def _open_records(path: Path, step: int) -> TextIO:
    """Open ``metrics.jsonl`` for appending, with only the records up to ``step`` kept."""
    kept = [line for line in _read_lines(path) if _step_of(line) <= step] if step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    return path.open("a", encoding="utf-8")


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """Return the step of a record; infinity for a line that a killed process left incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _nvml_handle() -> pynvml.c_nvmlDevice_t | None:
    """Return NVML's handle of this rank's GPU, found by UUID because NVML ignores CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None
