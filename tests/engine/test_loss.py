"""Loss extraction: finds the loss in every kind of model output, or explains why there is none."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.engine.loss import as_scalar, extract_loss
from lomo_ds.errors import ConfigError

LOSS = torch.tensor(1.0, requires_grad=True)
LOGITS = torch.zeros(3, 2, requires_grad=True)


@dataclass
class Output:
    """A custom model output."""

    logits: Tensor
    loss: Tensor | None


@pytest.mark.parametrize(
    "output",
    [
        LOSS,
        {"logits": LOGITS, "loss": LOSS},
        Output(LOGITS, LOSS),
        (LOSS, LOGITS),
        (LOGITS, LOSS),
        [LOGITS, None, LOSS],
        (LOGITS, torch.tensor(0.5), LOSS),  # an accuracy has no graph
        (torch.tensor(3), LOSS),
    ],
)
def test_finds_the_loss(output: Any) -> None:
    loss = extract_loss(output)
    assert loss.data_ptr() == LOSS.data_ptr()
    assert loss.requires_grad


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_may_have_any_shape_with_one_element(shape: tuple[int, ...]) -> None:
    loss = extract_loss(LOSS.reshape(shape))
    assert (loss.shape, loss.requires_grad) == ((), True)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (None, "returned no loss, but a NoneType"),
        ({"logits": LOGITS}, "labels must be in the batch"),
        ({"loss": None}, "labels must be in the batch"),
        (Output(LOGITS, None), "labels must be in the batch"),
        ((LOGITS,), r"tuple of tensors of shapes \[3, 2\]; labels must be in the batch"),
        ((None, None), "labels must be in the batch"),
        ((LOSS, LOGITS, LOSS * 2), "2 scalars that could be its loss"),
        (LOGITS, r"shape \[3, 2\]; reduce it to its mean"),
        ({"loss": torch.zeros(0)}, r"shape \[0\]"),
        ({"loss": 1.0}, "must be a tensor, got a float"),
        ("loss", "returned no loss, but a str"),
        (LOSS.detach(), "depends on no trainable parameter"),
        ((LOSS.detach(), LOGITS), "depends on no trainable parameter"),
        (torch.tensor(3), "must have a floating-point dtype, got int64"),
        (torch.tensor(1j), "must have a floating-point dtype, got complex64"),
    ],
)
def test_invalid_losses_are_refused(output: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        extract_loss(output)


def test_a_loss_needs_no_graph_without_grad() -> None:
    with torch.no_grad():
        assert extract_loss((LOGITS.detach(), LOSS.detach())) == 1.0


def test_an_output_instead_of_its_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got a SimpleNamespace; pass its \.loss"):
        as_scalar(SimpleNamespace(loss=LOSS))
