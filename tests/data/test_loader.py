"""Tests of the path from samples to the batches of each rank."""

import itertools
from typing import Any

import pytest
import torch

from lomo_ds.data import IGNORE_INDEX, PackedSequences, Position, TrainingSteps, evaluation_batches
from tests.data.datasets import make_samples, text_blocks


def blocks(count: int, length: int = 4) -> PackedSequences:
    return text_blocks(range(count), length)


def test_blocks_cover_every_token_once() -> None:
    packed = blocks(10)
    assert [packed[index]["input_ids"].tolist() for index in range(len(packed))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 0],
    ]
    assert packed[2]["labels"].tolist() == [8, 9, IGNORE_INDEX, IGNORE_INDEX]
    assert packed[0]["labels"].dtype == torch.int64
    with pytest.raises(IndexError):
        packed[3]


def training_steps(rank: int, world_size: int, **changes: Any) -> TrainingSteps:
    arguments: dict[str, Any] = {"batch_size": 2, "accumulation": 2, "seed": 5, "epochs": 2.0} | changes
    sequences = arguments.pop("sequences", blocks(4 * 23))
    return TrainingSteps(sequences, rank=rank, world_size=world_size, **arguments)


def trained_on(step: list[dict[str, torch.Tensor]]) -> list[int]:
    """Return the first token of each sequence with labels in a step."""
    return [int(row[0]) for batch in step for row in batch["labels"] if (row != IGNORE_INDEX).any()]


def epoch_by_epoch(world_size: int) -> list[list[int]]:
    """Return what all ranks train on in each epoch, and check that their micro-batches match in number and shape."""
    ranks = [training_steps(rank, world_size) for rank in range(world_size)]
    epochs: list[list[int]] = [[], []]
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
        assert all(batch["input_ids"].shape == (2, 4) for part in parts for batch in part)
        epoch = ranks[0].position.epoch if ranks[0].position.consumed else ranks[0].position.epoch - 1
        epochs[epoch] += [first for part in parts for first in trained_on(part)]
    return epochs


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_has_every_sequence_once_and_a_new_order(world_size: int) -> None:
    first, second = epoch_by_epoch(world_size)
    assert sorted(first) == sorted(second) == list(range(0, 92, 4))
    assert first != second


@pytest.mark.parametrize("strategy", ["none", "bfd", "bfd_split"])
def test_a_packed_epoch_has_every_sample_once_on_changing_ranks(strategy: Any) -> None:
    """Use 2, 3 and 1 ranks; samples are told by their tokens, of which no two are equal."""
    samples = make_samples([3 + 5 * number % 11 for number in range(40)], prompts=[1] * 40)
    sequences = PackedSequences(samples, 8, strategy)
    position, tokens = Position(), []
    for world_size, count in ((2, 1), (3, 1), (1, 99)):
        more = {"sequences": sequences, "start": position, "batch_size": 1, "epochs": 1.0}
        ranks = [training_steps(rank, world_size, **more) for rank in range(world_size)]
        for parts in itertools.islice(zip(*ranks, strict=True), count):
            labels = [batch["labels"] for part in parts for batch in part]
            tokens += [int(label) for rows in labels for label in rows.flatten() if label != IGNORE_INDEX]
        position = ranks[0].position
    all_labels = [sequences[index]["labels"] for index in range(len(sequences))]
    assert sorted(tokens) == sorted(int(label) for row in all_labels for label in row if label != IGNORE_INDEX)
    assert len(set(tokens)) == len(tokens)
    assert ranks[0].tokens == sequences.sizes.sum()


def test_a_step_has_the_same_sequences_for_any_world_size() -> None:
    """Check it for equal numbers of sequences per step: 12 = 1 x 2 x 6 = 3 x 2 x 2."""
    one_rank = [sorted(trained_on(step)) for step in training_steps(0, 1, accumulation=6)]
    ranks = [training_steps(rank, 3) for rank in range(3)]
    three_ranks = [sorted(first for part in parts for first in trained_on(part)) for parts in zip(*ranks, strict=True)]
    assert one_rank == three_ranks


def test_changing_the_world_size_repeats_and_loses_no_sequence() -> None:
    """Use 4, 2, 1 and 3 ranks: each trains one step of the first epoch, and the last trains to its end."""
    position, seen = Position(), []
    for world_size, count in ((4, 1), (2, 1), (1, 1), (3, 99)):
        batch = {"batch_size": 1, "accumulation": 2, "epochs": 1.0}
        ranks = [training_steps(rank, world_size, start=position, **batch) for rank in range(world_size)]
        for parts in itertools.islice(zip(*ranks, strict=True), count):
            seen += [first for part in parts for first in trained_on(part)]
        position = ranks[0].position
    assert sorted(seen) == list(range(0, 92, 4))
    assert position == Position(1, 0)


@pytest.mark.parametrize(("epochs", "max_steps", "total"), [(1.0, -1, 6), (1.5, -1, 6 + 3), (0.1, -1, 1), (9.0, 7, 7)])
def test_number_of_steps(epochs: float, max_steps: int, total: int) -> None:
    steps = training_steps(0, 1, epochs=epochs, max_steps=max_steps)
    assert steps.total == total
    assert len(list(steps)) == total
    if max_steps < 0:
        assert steps.epochs == pytest.approx(epochs, abs=0.03)
    middle = training_steps(0, 1, epochs=epochs, max_steps=max_steps, start=Position(0, 0), step=0)
    next(iter(middle))
    resumed = training_steps(0, 1, epochs=epochs, max_steps=max_steps, start=middle.position, step=1)
    assert resumed.total == total, "the total does not change on resume"


@pytest.mark.parametrize(("count", "world_size", "batch_size"), [(12, 3, 2), (13, 3, 2), (1, 4, 2), (7, 2, 8)])
def test_evaluation_has_each_sequence_once_and_equal_batches_per_rank(
    count: int, world_size: int, batch_size: int
) -> None:
    packed = blocks(4 * count)
    ranks = [list(evaluation_batches(packed, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [
        int(labels[0])
        for batches in ranks
        for batch in batches
        for labels in batch["labels"]
        if (labels != IGNORE_INDEX).any()
    ]
    assert sorted(seen) == list(range(0, 4 * count, 4))
    assert all(batch["input_ids"].shape == (batch_size, 4) for batches in ranks for batch in batches)
