"""Batches of train_batch: validation, transfer to a device, and dummy labels."""

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from lomo_ds.engine.batches import as_micro_batches, move_to_device, with_dummy_labels
from lomo_ds.errors import ConfigError

X = torch.zeros(2, 3)
Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, BatchEncoding])
def test_any_mapping_is_a_micro_batch(kind: Any) -> None:
    batch = kind({"x": X})
    assert as_micro_batches(batch) == [batch]
    assert as_micro_batches([batch, batch]) == as_micro_batches((batch, batch)) == [batch, batch]


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((X, X), "got a tuple of Tensor; give a dict such as"),
        ([X, X], "got a list of Tensor"),
        ([{"x": X}, (X, X)], "got a list of dict, tuple"),
        (X, "got a Tensor"),
        (None, "got a NoneType"),
        (({"x": X} for _ in range(2)), "got a generator"),
        ("text", "got a str"),
        ([], "got an empty list"),
        ((), "got an empty list"),
        ({0: X}, "got the key 0"),
        ({"x": X, "num_items_in_batch": torch.tensor(7)}, "leave num_items_in_batch out"),
    ],
)
def test_batches_without_argument_names_are_refused(batch: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        as_micro_batches(batch)


def test_nested_tensors_are_moved() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)])
    batch = {"x": X, "nested": [X, {"y": (X, Pair(X, 1.0))}], "encoding": UserDict(z=X), "packed": packed, "k": "text"}
    moved = move_to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["nested"][0].is_meta
    assert moved["nested"][1]["y"][0].is_meta
    assert moved["nested"][1]["y"][1].left.is_meta
    assert moved["nested"][1]["y"][1].right == 1.0
    assert moved["encoding"]["z"].is_meta
    assert moved["packed"].data.is_meta
    assert moved["k"] == "text"


def test_dummy_labels_do_not_change_the_original_batch() -> None:
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])}
    filled = with_dummy_labels(batch)
    assert filled["labels"].tolist() == [[0, 0]]
    assert filled["input_ids"] is batch["input_ids"]
    assert batch["labels"].tolist() == [[-100, -100]]
