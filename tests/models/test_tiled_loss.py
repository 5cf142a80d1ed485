"""Tests that the tiled loss is as exact as the loss of full logits, and never allocates as much memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.models.tiled_loss import MAX_BLOCKS, tiled_cross_entropy
from lomo_ds.planner.trace_events import StepTrace
from lomo_ds.planner.trace_recorder import TraceRecorder
from tests.largest import Largest

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """Sizes of a linear layer and its tiles."""

    tokens: int
    vocabulary: int
    tile_bytes: int


CASES = [
    Case(40, 100, 2**20),  # one tile
    Case(40, 100, 4 * 1000),  # four blocks of the vocabulary
    Case(41, 103, 4 * 100),  # four blocks, 14 runs of tokens, neither of which divide
    Case(7, 50, 4),  # less than a row fits
    Case(1, 1, 64),
]


def layer(case: Case, seed: int = 0, size: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, a weight, a bias, and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.tokens, size, generator=generator)
    weight = torch.randn(case.vocabulary, size, generator=generator)
    bias = torch.randn(case.vocabulary, generator=generator)
    labels = torch.randint(case.vocabulary, (case.tokens,), generator=generator)
    labels[1::5] = -100
    return hidden, weight, bias, labels


def loss_and_gradients(
    loss: Callable[..., Tensor], tensors: Sequence[Tensor | None], labels: Tensor, factor: float, **options: Any
) -> list[Tensor]:
    """Return the sum of cross-entropies and the gradients of ``factor`` times it, as float64."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    total = loss(*leaves, labels, **options)
    (total * factor).backward()
    gradients = [leaf.grad for leaf in leaves if leaf is not None]
    return [tensor.double() for tensor in [total.detach(), *gradients] if tensor is not None]


def full_logits_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Compute the loss like transformers, but without a cast to float32 if the inputs are float64."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_equal_in_fp32(case: Case, with_bias: bool) -> None:
    hidden, weight, bias, labels = layer(case)
    tensors = [hidden, weight, bias if with_bias else None]
    expected = loss_and_gradients(full_logits_loss, tensors, labels, factor=0.37)
    actual = loss_and_gradients(tiled_cross_entropy, tensors, labels, factor=0.37, tile_bytes=case.tile_bytes)
    assert len(actual) == 3 + with_bias
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_full_logits(dtype: torch.dtype) -> None:
    """Use 4 blocks and 64 runs; a half-precision sum of so many products would have four times the error."""
    case = Case(tokens=2048, vocabulary=256, tile_bytes=4 * 64 * 32)
    hidden, weight, _, labels = layer(case)
    tensors = [hidden.to(dtype), (weight / 3).to(dtype), None]
    factor = 2.0**-11 * 2.0**10  # of the mean, at a loss scale
    truth = loss_and_gradients(full_logits_loss, [t if t is None else t.double() for t in tensors], labels, factor)
    expected = loss_and_gradients(full_logits_loss, tensors, labels, factor)
    actual = loss_and_gradients(tiled_cross_entropy, tensors, labels, factor, tile_bytes=case.tile_bytes)
    for name, value, reference, exact in zip(("loss", "hidden", "weight"), actual, expected, truth, strict=True):
        error, reference_error = float((value - exact).norm()), float((reference - exact).norm())
        print(f"{dtype}, {name}: {error / exact.norm():.1e} of it, full logits {reference_error / exact.norm():.1e}")
        assert error <= 1.5 * reference_error + 1e-6 * float(exact.norm()), name


def test_small_fp16_gradients_are_rounded_after_loss_scaling() -> None:
    case = Case(tokens=512, vocabulary=64, tile_bytes=4 * 100)
    hidden, weight, _, labels = layer(case)
    tensors = [hidden.half(), (weight / 10).half(), None]
    small = loss_and_gradients(tiled_cross_entropy, tensors, labels, factor=2.0**-24 * 2.0**16, tile_bytes=4 * 100)
    large = loss_and_gradients(tiled_cross_entropy, tensors, labels, factor=1.0, tile_bytes=4 * 100)
    torch.testing.assert_close(small[2] * 2**8, large[2], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_frozen_tensors_have_no_gradient(frozen: int) -> None:
    *tensors, labels = layer(CASES[2])
    expected = loss_and_gradients(full_logits_loss, tensors, labels, factor=1.0)[1:]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index != frozen)
    hidden, weight, bias = tensors
    tiled_cross_entropy(hidden, weight, bias, labels, tile_bytes=CASES[2].tile_bytes).backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (index == frozen)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), expected[index], rtol=2e-5, atol=1e-6)


def test_a_hook_gets_one_finished_gradient() -> None:
    """Check this because the update schedules use a gradient as soon as its hook runs."""
    case = CASES[2]
    hidden, weight, bias, labels = layer(case)
    expected = loss_and_gradients(full_logits_loss, [hidden, weight, bias], labels, factor=7.0)[2]
    seen: list[Any] = []
    parameter = Parameter(weight)
    parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    loss = tiled_cross_entropy(hidden, parameter, bias, labels, tile_bytes=case.tile_bytes)
    assert seen == [], "what the loss will be multiplied by is not known in forward"
    (loss * 7).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].double(), expected, rtol=2e-5, atol=1e-5)


def test_another_ignore_index() -> None:
    hidden, weight, _, labels = layer(CASES[2])
    labels_with_3 = torch.where(labels == -100, 3, labels)
    loss = tiled_cross_entropy(hidden, weight, None, labels_with_3, ignore_index=3, tile_bytes=400)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels_with_3, ignore_index=3, reduction="sum"))


@pytest.mark.parametrize("label", [103, -1])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    hidden, weight, bias, labels = layer(CASES[2])
    labels[5] = label
    with pytest.raises(RuntimeError, match="a label is outside the vocabulary"):
        tiled_cross_entropy(hidden, weight, bias, labels)


def test_a_non_finite_logit_gives_a_non_finite_loss() -> None:
    hidden, weight, bias, labels = layer(CASES[2])
    hidden[0, 0] = math.inf
    assert not tiled_cross_entropy(hidden, weight, bias, labels, tile_bytes=400).isfinite()


def test_no_tensor_is_as_large_as_the_logits() -> None:
    case = Case(tokens=600, vocabulary=500, tile_bytes=4 * 3000)
    hidden, weight, _, labels = layer(case, size=8)
    with Largest() as largest:
        loss_and_gradients(tiled_cross_entropy, [hidden, weight, None], labels, 2.0, tile_bytes=case.tile_bytes)
    assert largest.numel == case.tokens * 8, "the hidden states and their gradient; a tile has 3000"
    with Largest() as largest:
        loss_and_gradients(full_logits_loss, [hidden, weight, None], labels, 2.0)
    assert largest.numel == case.tokens * case.vocabulary


@pytest.mark.parametrize(
    ("dtype", "length", "products"),
    [(torch.bfloat16, 64, 0), (torch.bfloat16, 16, 1), (torch.float32, 64, 0), (torch.float32, 16, 1)],
)
def test_peak_memory_is_two_tiles_and_one_sum(dtype: torch.dtype, length: int, products: int) -> None:
    """Use one run or four runs per block; four products are summed in fp32, in the gradient itself if it is fp32."""
    tokens, vocabulary, size, width = 64, 512, 1024, 512 // MAX_BLOCKS
    tile_bytes = 4 * length * width
    with torch.device("meta"):
        hidden = torch.empty(tokens, size, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, size, dtype=dtype, requires_grad=True)
        labels = torch.empty(tokens, dtype=torch.int64)
    with TraceRecorder(StepTrace([], []), vocabulary) as recorder:
        for tensor in (hidden, weight, labels):
            recorder.exclude(tensor)
        tiled_cross_entropy(hidden, weight, None, labels, tile_bytes=tile_bytes).backward()
    gradients = hidden.nbytes + weight.nbytes
    product = products * width * size * dtype.itemsize
    fp32_sum = products * width * size * 4 * (dtype != torch.float32)
    small = 64 * tokens
    assert gradients + product < recorder.peak <= gradients + 2 * tile_bytes + product + fp32_sum + small


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_no_synchronization_and_little_memory(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case(tokens=8192, vocabulary=8000, tile_bytes=2**22)
    hidden, weight, _, labels = (tensor.cuda() for tensor in layer(case, size=64))
    tensors = [hidden.to(dtype), (weight / 8).to(dtype), None]
    expected = loss_and_gradients(full_logits_loss, tensors, labels, factor=0.1)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = loss_and_gradients(tiled_cross_entropy, tensors, labels, factor=0.1, tile_bytes=case.tile_bytes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - start < 4 * case.tokens * case.vocabulary / 4
    for value, reference in zip(results, expected, strict=True):
        assert (value - reference).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * reference.norm()
