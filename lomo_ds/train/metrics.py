"""What a run reports while it runs: metrics.jsonl, TensorBoard events, and each GPU's memory, use and power."""

import contextlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

import pynvml
import torch
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class Monitor:
    """Writes one record per logged step; rank 0 the training metrics, every rank its own GPU's.

    Files in ``output_dir``: ``metrics.jsonl``, one object per record; ``runs/`` for TensorBoard, the GPUs of
    further ranks below it as ``rank1``, ``rank2`` and so on.

    Args:
        step: that the run goes on from; what was recorded behind it is done again, and dropped. 0 begins anew.
    """

    def __init__(self, output_dir: Path, rank: int, step: int = 0) -> None:
        self.gpu = _own_gpu()
        runs = output_dir / "runs"
        self.writer = None
        if rank == 0 or self.gpu is not None:
            first = step + 1 if step else 0  # from which on older events are hidden
            self.writer = SummaryWriter(str(runs if rank == 0 else runs / f"rank{rank}"), purge_step=first)
        self.file = _open_records(output_dir / "metrics.jsonl", step) if rank == 0 else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for opened in (self.file, self.writer):
            if opened is not None:
                with contextlib.suppress(OSError):  # what could not be written has been told
                    opened.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` of ``step``; on ranks other than 0 only this rank's GPU is recorded.

        A full disk costs the record, not the run.
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
        if self.writer is not None:
            recorded = {f"train/{name}": value for name, value in metrics.items()} if self.file is not None else {}
            for name, value in (recorded | self._gpu_metrics()).items():
                self.writer.add_scalar(name, value, step)

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
            with contextlib.suppress(pynvml.NVMLError):  # a shared GPU tells less
                metrics[name] = float(read())
        return metrics


def _open_records(path: Path, step: int) -> TextIO:
    """``metrics.jsonl``, with the records up to ``step`` of a run that goes on from there."""
    kept = [line for line in _lines(path) if _step_of(line) <= step] if step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    return path.open("a", encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a record; that of a line cut short by a killed process is behind every other."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _own_gpu() -> pynvml.c_nvmlDevice_t | None:
    """NVML's handle of the GPU this rank computes on; by UUID, since NVML ignores CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None
