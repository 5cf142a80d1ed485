"""What a run reports while it runs: metrics.jsonl, TensorBoard events, and each GPU's memory, use and power."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pynvml
import torch
from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Writes one record per logged step; rank 0 the training metrics, every rank its own GPU's.

    Files in ``output_dir``: ``metrics.jsonl``, one object per record; ``runs/`` for TensorBoard, the GPUs of
    further ranks below it as ``rank1``, ``rank2`` and so on.
    """

    def __init__(self, output_dir: Path, rank: int) -> None:
        self.gpu = _own_gpu()
        runs = output_dir / "runs"
        self.writer = None
        if rank == 0 or self.gpu is not None:
            self.writer = SummaryWriter(str(runs if rank == 0 else runs / f"rank{rank}"))
        self.file = (output_dir / "metrics.jsonl").open("w", encoding="utf-8") if rank == 0 else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` of ``step``; on ranks other than 0 only this rank's GPU is recorded."""
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
