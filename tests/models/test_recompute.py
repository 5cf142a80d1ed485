"""Activations computed again: the same gradients, and of each layer only its input kept."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lomo_ds.arguments import TrainArguments
from lomo_ds.errors import ConfigError
from lomo_ds.models import recompute, recompute_activations
from tests.reference import tiny_model, whole_batch


class Watched(saved_tensors_hooks):
    """Stands for host memory, which on the CPU is no other: keeps what goes there and what comes back."""

    gone: list[tuple[int, ...]]
    back: int

    def __init__(self, pin_memory: bool) -> None:
        assert pin_memory == torch.cuda.is_available()
        super().__init__(self.go, self.come_back)

    @staticmethod
    def go(tensor: Tensor) -> Tensor:
        Watched.gone.append(tuple(tensor.shape))
        return tensor.clone()

    @staticmethod
    def come_back(tensor: Tensor) -> Tensor:
        Watched.back += 1
        return tensor


def gradients(model: Any) -> list[Tensor]:
    model(**whole_batch(0, rows=3)).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_the_same_and_inputs_of_layers_lie_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    Watched.gone, Watched.back = [], 0
    monkeypatch.setattr(recompute, "save_on_cpu", Watched)
    model = tiny_model()
    expected = gradients(copy.deepcopy(model))
    recompute_activations(model, offload)
    found = gradients(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert Watched.gone == ([(3, 12, 20)] * 2 if offload else []), "batch x sequence x hidden, once a layer"
    assert Watched.back == len(Watched.gone)


def test_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="cannot compute its activations again"):
        recompute_activations(model)


def test_offload_without_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigError, match="give both"):
        TrainArguments("model", "text", "out", activation_offload=True)
