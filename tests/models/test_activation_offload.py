"""Tests of activation offload: exact in any order of streams, with prefetch and reused buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.memory import host_memory
from lomo_ds.memory.host_memory import Fetch, HostTransfer
from lomo_ds.models import activation_offload
from lomo_ds.models.activation_offload import ActivationOffload
from tests.fake_streams import FakeDevice

LAYERS = 5


@pytest.fixture(autouse=True)
def tiny_tensors_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 200)


def forward(
    weights: list[Tensor], rows: int, checkpoint: Callable[..., Any] = lambda layer, value: layer(value)
) -> Tensor:
    """A model in which each layer's input is a non-contiguous view of another layer's output."""
    value = torch.linspace(-1, 1, 4 * rows).view(rows, 4) * weights[0][0]
    for weight in weights:
        value = checkpoint(lambda given, w=weight: torch.tanh(given @ w) * given, value.t().contiguous().t())
    return value.sum()


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(4, 4, generator=generator)) for _ in range(LAYERS)]


def gradients_of(given: list[Tensor], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, given))


def fail_in_backward(given: list[Tensor], loss: Tensor) -> None:
    handle = given[2].register_hook(lambda gradient: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()


@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_exact_in_any_order_of_streams(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    given = weights()
    expected = [gradients_of(given, forward(given, rows)) for rows in (3, 5, 3)]
    with FakeDevice(monkeypatch, seed) as device:
        offload = ActivationOffload(LAYERS)
        gradients = []
        for rows in (3, 5, 3):
            forward(given, rows, offload)  # whose backward never comes
            fail_in_backward(given, forward(given, rows, offload))
            gradients.append(gradients_of(given, forward(given, rows, offload)))
    assert device.reused
    for actual, reference in zip(gradients, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(actual, reference, strict=True))


def test_backward_prefetches_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Noted(HostTransfer):
        def start_fetch(self, host_tensor: Tensor) -> Fetch:
            log.append("fetch")
            return super().start_fetch(host_tensor)

        def finish_fetch(self, fetch: Fetch) -> Tensor:
            log.append("use")
            return super().finish_fetch(fetch)

    monkeypatch.setattr(activation_offload, "HostTransfer", Noted)
    given = weights()
    gradients_of(given, forward(given, 3, ActivationOffload(LAYERS)))
    assert log == ["fetch", *["fetch", "use"] * (LAYERS - 1), "use"]


def test_buffers_are_reused() -> None:
    """Check it with a failed backward, whose graph torch frees only in the next one; this allows a second set once."""
    given = weights()
    offload = ActivationOffload(LAYERS)
    taken = []
    for _ in range(3):
        for _ in range(2):
            forward(given, 3, offload)  # whose backward never comes
        fail_in_backward(given, forward(given, 3, offload))
        for _ in range(2):
            gradients_of(given, forward(given, 3, offload))
        taken.append(len(offload.free) + len(offload.released))
    assert LAYERS <= taken[0] <= 2 * LAYERS
    assert taken == [taken[0]] * 3
    assert offload.pinned is not None
    assert offload.pinned.slabs.taken == [64 * taken[0]]


def test_backward_can_be_run_twice() -> None:
    given = weights()
    loss = forward(given, 3, ActivationOffload(LAYERS))
    first = torch.autograd.grad(loss, given, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, gradients_of(given, loss), strict=True))


def test_other_tensors_are_not_offloaded() -> None:
    offload = ActivationOffload(LAYERS)
    weight = Parameter(torch.ones(3))
    (gradient,) = torch.autograd.grad(offload(lambda given: given * given, weight).sum(), [weight])
    assert gradient.tolist() == [2.0] * 3
    scale = torch.ones(3, requires_grad=True)
    offload(lambda numbers: scale * numbers, torch.arange(3)).sum().backward()
    assert offload.transfer is None


def test_inputs_of_unequal_sizes_are_pinned_once() -> None:
    """If they are expected, buffers have the largest size from the first one on."""
    given = weights()
    offload = ActivationOffload(LAYERS)
    offload.expect(2 * LAYERS, 4 * 5 * 4)
    losses = [forward(given, rows, offload) for rows in (3, 5)]
    for loss in losses:
        gradients_of(given, loss)
    assert offload.pinned is not None
    assert offload.buffers == 2 * LAYERS
    assert sum(offload.pinned.slabs.taken) == 2 * LAYERS * 128, "each is aligned to 64 bytes"
