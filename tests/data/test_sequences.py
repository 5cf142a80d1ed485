"""Packing of samples into sequences, and mixtures of several datasets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_ds.data import IGNORE_INDEX, Mixture, PackedSequences
from lomo_ds.data.sequences import collate
from tests.data.datasets import make_samples, text_blocks

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def contents(sequences: Any) -> list[list[int]]:
    """Return the tokens of each sequence without padding."""
    return [sequences[k]["input_ids"][: sequences.sizes[k]].tolist() for k in range(len(sequences))]


def test_blocks_cover_every_token_once() -> None:
    blocks = text_blocks(range(10), 4)
    assert [blocks[index]["input_ids"].tolist() for index in range(len(blocks))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 0],
    ]
    assert blocks[2]["labels"].tolist() == [8, 9, IGNORE_INDEX, IGNORE_INDEX]
    assert blocks[0]["labels"].dtype == torch.int64
    assert "position_ids" not in blocks[0], "tokens see those of the text before"
    with pytest.raises(IndexError):
        blocks[3]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(2, 40), st.data())
@pytest.mark.parametrize("strategy", ["none", "bfd", "bfd_split", "wrapped"])
def test_no_token_is_lost_or_repeated(strategy: Any, lengths: list[int], length: int, data: st.DataObject) -> None:
    """Check it for any choice of samples; those of one token have nothing to learn, and are left out."""
    samples = make_samples(lengths)
    chosen = np.asarray(sorted(data.draw(st.sets(st.sampled_from(range(len(lengths))), min_size=1))))
    sequences = PackedSequences(samples, length, strategy, chosen)
    parts = [list(range(samples.starts[k], samples.starts[k + 1])) for k in chosen]
    if strategy in ("none", "bfd"):
        parts = [part[:length] for part in parts if len(part) > 1]
    if strategy == "bfd_split":
        pieces = [part[first : first + length] for part in parts for first in range(0, len(part), length)]
        parts = [piece for piece in pieces if len(piece) > 1]
    assert sorted(token for tokens in contents(sequences) for token in tokens) == [t for part in parts for t in part]
    assert all(size <= length for size in sequences.sizes)
    assert sequences.losses.cut_tokens == (
        sum(max(0, lengths[k] - length) for k in chosen) if strategy in ("none", "bfd") else 0
    )


def test_samples_side_by_side() -> None:
    """Check that each begins at position 0 without a label, and that padding is a sample of its own."""
    packed = PackedSequences(make_samples([3, 5, 2], prompts=[2, 1, 0]), 8, "bfd")
    assert packed[0]["input_ids"].tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    assert packed[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed[0]["labels"].tolist() == [-100, 4, 5, 6, 7, -100, -100, 2]
    assert packed[1]["input_ids"].tolist() == [8, 9, 0, 0, 0, 0, 0, 0]
    assert packed[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert packed[1]["labels"].tolist() == [-100, 9, *[-100] * 6]
    assert packed.padding == pytest.approx(6 / 16)


@pytest.mark.parametrize("strategy", ["none", "bfd", "bfd_split"])
def test_samples_without_anything_to_learn_are_left_out_and_counted(strategy: Any) -> None:
    """Check prompts that fill a sequence, a sample of one token, and one whose only label is the first."""
    packed = PackedSequences(make_samples([6, 1, 4, 3], prompts=[4, 0, 1, 3]), 4, strategy)
    learnt = [token for tokens in contents(packed) for token in tokens]
    assert learnt == ([7, 8, 9, 10, 4, 5] if strategy == "bfd_split" else [7, 8, 9, 10])
    losses = packed.losses
    assert losses.unlabelled_samples == (2 if strategy == "bfd_split" else 3)
    assert losses.unlabelled_tokens == 4 + 1 + 3
    assert (losses.cut_samples, losses.cut_tokens) == ((0, 0) if strategy == "bfd_split" else (1, 2))


def test_sequences_of_a_batch_are_padded_to_the_longest() -> None:
    batch = collate([PackedSequences(make_samples([3, 5]), 8, "none")[k] for k in range(2)])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [[0, 1, 2, -100, -100], [3, 4, 5, 6, 7]]
    assert set(batch) == {"input_ids", "labels"}, "no mask is needed: no token sees one behind it"


def test_a_batch_of_texts_and_of_samples() -> None:
    items = [text_blocks(range(4), 4)[0], PackedSequences(make_samples([2, 2]), 4, "bfd")[0]]
    batch = collate(items)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 1], [1] * 8), ([2, 1], [2] * 5 + [1] * 3), ([0.4, 1], [1, 0, 1, 0, 0] + [1] * 3),
     ([1, 2.34], [1] * 5 + [3, 2, 2]), ([1.4, 1], [2, 1, 2, 1, 1] + [1] * 3)],
)  # fmt: skip
def test_a_mixture_has_each_sequence_as_often_as_its_weight(weights: Sequence[float], counts: list[int]) -> None:
    parts = [text_blocks(range(20), 4), text_blocks(range(20, 31), 4)]
    mixture = Mixture(parts, weights)
    firsts = [int(mixture[k]["input_ids"][0]) for k in range(len(mixture))]
    assert [firsts.count(first) for first in range(0, 32, 4)] == counts
    assert mixture.sizes.tolist() == [3 if first == 28 else 4 for first in firsts]
    assert mixture.digest() != Mixture(parts, [9, 9]).digest()


@pytest.mark.parametrize(
    "other",
    [
        PackedSequences(make_samples([3, 5, 2], prompts=[2, 1, 0]), 8, "bfd"),
        PackedSequences(make_samples([3, 5, 2]), 9, "bfd"),
        PackedSequences(make_samples([3, 5, 2]), 8, "bfd_split"),
        PackedSequences(make_samples([5, 3, 2]), 8, "bfd"),
    ],
)
def test_the_digest_distinguishes_labels_lengths_and_strategies(other: PackedSequences) -> None:
    assert PackedSequences(make_samples([3, 5, 2]), 8, "bfd").digest() != other.digest()
