"""What a micro-batch weighs."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lomo_ds.loss import count_items, loss_of, shifts_labels, with_any_labels
from tests.reference import tiny_model

LABELS = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])


def test_counts_the_labels_that_a_loss_averages_over() -> None:
    assert count_items({"labels": LABELS}, shifts_labels=False) == 4
    assert count_items({"labels": LABELS}, shifts_labels=True) == 3, "nothing predicts the first of a row"
    assert count_items({"labels": LABELS, "shift_labels": LABELS[:, 2:]}, shifts_labels=True) == 3


@pytest.mark.parametrize("batch", [{"x": torch.zeros(3, 2)}, {"scale": 2.0, "labels": torch.zeros(3, 2)}])
def test_rows_count_where_labels_do_not_tell(batch: dict[str, torch.Tensor]) -> None:
    assert count_items(batch, shifts_labels=True) == 3


def test_causal_models_shift_labels() -> None:
    assert shifts_labels(tiny_model())
    tiny_gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=1))
    assert shifts_labels(tiny_gpt2), "its name does not say so, and it uses the loss that does"
    assert not shifts_labels(torch.nn.Linear(1, 1))


def test_finds_the_loss() -> None:
    loss = torch.tensor(1.0)

    class Output:
        def __init__(self) -> None:
            self.loss = loss

    assert all(loss_of(output) is loss for output in (loss, (loss, None), {"loss": loss}, Output()))


def test_any_labels_make_a_loss_without_changing_the_batch() -> None:
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])}
    filled = with_any_labels(batch)
    assert filled["labels"].tolist() == [[0, 0]]
    assert filled["input_ids"] is batch["input_ids"]
    assert batch["labels"].tolist() == [[-100, -100]]
