"""Item counts: known for transformers models, counted in both possible ways for others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMultipleChoice,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lomo_ds.engine.items import Count, count_items, count_sums, parse_num_items, shifts_labels, total_items
from lomo_ds.errors import ConfigError
from tests.reference import tiny_model

LABELS = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 9]])

BART = BartConfig(
    vocab_size=11, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
    encoder_ffn_dim=4, decoder_ffn_dim=4, dropout=0.0,
)  # fmt: skip
T5 = T5Config(
    vocab_size=11, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1, dropout_rate=0.0, decoder_start_token_id=0
)
GPT2 = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=1)
BERT = BertConfig(
    vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
    max_position_embeddings=8,
)  # fmt: skip


class WithItsOwnLoss(LlamaForCausalLM):
    """A causal model by name whose custom loss does not shift labels."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = super().forward(input_ids=input_ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def own_loss() -> WithItsOwnLoss:
    return WithItsOwnLoss(tiny_model().config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2)


def bart() -> BartForCausalLM:
    return BartForCausalLM(BART)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5)


def bert() -> BertForMultipleChoice:
    return BertForMultipleChoice(BERT)


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("make", "shifts"),
    [
        (tiny_model, True),
        (gpt2, True),  # the name does not end in ForCausalLM, but the loss shifts
        (bart, False),  # the name ends in ForCausalLM, but the loss does not shift
        (t5, False),
        (bert, False),
        (own_loss, None),
        (linear, None),
    ],
)
def test_label_shift_of_models(make: Callable[[], torch.nn.Module], shifts: bool | None) -> None:
    assert shifts_labels(make()) is shifts


@pytest.mark.parametrize("make", [tiny_model, gpt2, bart, t5])
def test_losses_are_averaged_over_the_counted_items(make: Callable[[], PreTrainedModel]) -> None:
    """Check that the mean over both rows equals the mean of the rows, weighted by their counts."""
    model = make().eval()
    rows = [{"input_ids": IDS[row : row + 1], "labels": LABELS[row : row + 1]} for row in range(2)]
    counts = [count_items(row, shifts_labels(model)).items for row in rows]
    means = [float(model(**row).loss.detach()) for row in rows]
    weighted = sum(count * mean for count, mean in zip(counts, means, strict=True)) / sum(counts)
    assert weighted == pytest.approx(float(model(input_ids=IDS, labels=LABELS).loss.detach()), abs=1e-6)


@pytest.mark.parametrize(
    ("shifts", "count"),
    [(False, Count(4, 4)), (True, Count(3, 3)), (None, Count(4, 3))],
    ids=["not", "shifts", "maybe"],
)
def test_counts_the_labels_that_a_loss_averages_over(shifts: bool | None, count: Count) -> None:
    assert count_items({"labels": LABELS}, shifts) == count
    assert count_items({"labels": LABELS, "shift_labels": LABELS[:, 2:]}, shifts) == Count(3, 3)
    assert count_items({"labels": LABELS, "shift_labels": None}, shifts) == count


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"x": torch.zeros(3, 2)}, Count(3, 3)),
        ({"scale": torch.tensor(2.0), "x": torch.zeros(3, 2)}, Count(3, 3)),
        ({"labels": None, "x": torch.zeros(3, 2)}, Count(3, 3)),
        ({"scale": 2.0, "labels": torch.zeros(3, 2)}, Count(3, 6)),
        ({"labels": torch.zeros(3)}, Count(3, 3)),
        ({"labels": torch.tensor(1.0)}, Count(1, 1)),
        ({"labels": torch.tensor([0, 2, 1])}, Count(3, 3)),  # class labels, which are never shifted
        ({"labels": torch.tensor(2)}, Count(1, 1)),
        ({"labels": torch.tensor([True, False])}, Count(2, 2)),
    ],
)
def test_rows_are_counted_without_integer_labels(batch: dict[str, Any], count: Count) -> None:
    assert count_items(batch, shifts=None) == count


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({}, "must hold a tensor whose rows can be counted; give num_items"),
        ({"scale": torch.tensor(1.0), "text": "a"}, "must hold a tensor whose rows can be counted; give num_items"),
        ({"labels": [1, 2]}, "labels must be a tensor to be counted, got a list; give num_items"),
        ({"labels": torch.zeros(0, 4)}, r"labels must not be empty, got shape \[0, 4\]"),
        ({"x": torch.zeros(0, 4)}, "must have at least one row"),
    ],
)
def test_batches_that_cannot_be_counted_are_refused(batch: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        count_items(batch, shifts=None)


@pytest.mark.parametrize("counts", [[(3, 2), (6, 4)], [(0, 0), (5, 4)], [(7, 7), (1, 1)], [(0, 0)], [(9, 5)]])
def test_two_counts_with_equal_weights(counts: list[tuple[int, int]]) -> None:
    assert total_items(count_sums([Count(*count) for count in counts])) == sum(items for items, _ in counts)


@pytest.mark.parametrize("counts", [[(3, 2), (4, 3)], [(1, 0), (1, 1)], [(1, 0)], [(10**6, 10**6 - 1), (10**6, 10**6)]])
def test_two_counts_with_different_weights_are_refused(counts: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match="give num_items to train_batch"):
        total_items(count_sums([Count(*count) for count in counts]))


@pytest.mark.parametrize("tensors", [(3, 1), (3, 3, 1)])
def test_batches_of_equal_shapes_have_equal_weights(tensors: tuple[int, ...]) -> None:
    batch = {str(number): torch.zeros(length) for number, length in enumerate(tensors)}
    count = count_items(batch, shifts=None)
    assert total_items(count_sums([count, count])) == 2 * tensors[0]
    other = count_items(batch | {"0": torch.zeros(7)}, shifts=None)
    with pytest.raises(ConfigError, match="the tensors of the batch differ in length"):
        total_items(count_sums([count, other]))


def test_num_items_is_one_count_per_micro_batch() -> None:
    assert parse_num_items(3, 1) == parse_num_items([3], 1) == parse_num_items(torch.tensor(3), 1) == [Count(3, 3)]  # type: ignore[arg-type]
    assert parse_num_items((3, 0), 2) == [Count(3, 3), Count(0, 0)]


@pytest.mark.parametrize("num_items", [[3], 3, [3, -1], [3, 1.5], [True, 1], "34", None])
def test_invalid_num_items_are_refused(num_items: Any) -> None:
    with pytest.raises(ConfigError, match="a list of one for each of the 2 micro-batches, got"):
        parse_num_items(num_items, 2)
