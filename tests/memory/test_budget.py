"""Tests of the measurement of free memory."""

from types import SimpleNamespace

import pytest
import torch

from lomo_ds.distributed import device
from lomo_ds.memory import budget


def test_free_cuda_memory_includes_what_torch_has_reserved_but_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes() -> int:
        raise ValueError("invalid literal for int() with base 10: 'GPU-3a0c'")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3a0c")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    fake = SimpleNamespace(device_name=lambda: "cuda", available_memory=crashes)
    monkeypatch.setattr(device, "get_accelerator", lambda: fake)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 650)
    assert budget.free_bytes() == (150, 1000)


def test_free_memory_of_other_devices_is_deepspeeds_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    fake = SimpleNamespace(device_name=lambda: "cpu", available_memory=lambda: 123)
    monkeypatch.setattr(device, "get_accelerator", lambda: fake)
    assert budget.free_bytes()[0] == 123
