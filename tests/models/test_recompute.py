"""Tests of activation checkpointing: equal gradients, and only the input of each layer is kept."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.errors import ConfigError
from lomo_ds.memory.host_memory import Fetch, HostTransfer
from lomo_ds.models import activation_offload, recompute_activations
from tests.reference import tiny_model, whole_batch


def gradients(model: Any) -> list[Tensor]:
    model(**whole_batch(0, rows=3)).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Watched(HostTransfer):
    """Record the shapes of tensors that are offloaded and fetched."""

    log: list[tuple[str, tuple[int, ...]]]

    def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
        self.log.append(("offload", tuple(tensor.shape)))
        super().offload(tensor, host_tensor)

    def start_fetch(self, host_tensor: Tensor) -> Fetch:
        self.log.append(("fetch", tuple(host_tensor.shape)))
        return super().start_fetch(host_tensor)


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_equal_and_layer_inputs_are_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    monkeypatch.setattr(Watched, "log", [], raising=False)
    monkeypatch.setattr(activation_offload, "HostTransfer", Watched)
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    model = tiny_model()
    expected = gradients(copy.deepcopy(model))
    recompute_activations(model, offload)
    actual = gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    shape = (3, 12, 20)  # batch x sequence x hidden, once a layer
    assert Watched.log == ([("offload", shape)] * 2 + [("fetch", shape)] * 2 if offload else [])


def test_a_model_without_checkpointing_support(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="does not support activation checkpointing"):
        recompute_activations(model)


def test_offload_needs_gradient_checkpointing() -> None:
    with pytest.raises(ConfigError, match="give both"):
        TrainArguments(model_name_or_path="m", train_file=["t.txt"], output_dir="out", activation_offload=True)
