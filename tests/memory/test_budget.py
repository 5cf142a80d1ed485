"""How much memory is free."""

from types import SimpleNamespace

import pytest
import torch

from lomo_ds.memory import budget


def test_free_on_cuda_is_what_the_driver_has_left_and_torch_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes() -> int:
        raise ValueError("invalid literal for int() with base 10: 'GPU-3a0c'")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3a0c")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    fake = SimpleNamespace(device_name=lambda: "cuda", available_memory=crashes)
    monkeypatch.setattr(budget, "get_accelerator", lambda: fake)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 650)
    assert budget.free_bytes() == (150, 1000)


def test_free_elsewhere_is_what_deepspeed_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    fake = SimpleNamespace(device_name=lambda: "cpu", available_memory=lambda: 123)
    monkeypatch.setattr(budget, "get_accelerator", lambda: fake)
    assert budget.free_bytes()[0] == 123
