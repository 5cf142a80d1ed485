"""From a file to the batches of each rank."""

import functools
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lomo_ds.data import PackedBlocks, evaluation_batches, tokenize_file, tokens, training_loader
from lomo_ds.loss import IGNORE_INDEX


class Letters:
    """A tokenizer whose tokens are characters, the begin 0 and the end 1."""

    bos_token_id = 0
    eos_token_id = 1
    calls = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.calls += 1
        return {"input_ids": [ord(letter) for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(128)}


def letters() -> Any:
    return Letters()


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_each_document_stands_between_begin_and_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ab"}\n{"text": "c"}\n')
    assert tokenize_file(file, letters(), tmp_path / "cache").tolist() == [0, *ids("ab"), 1, 0, *ids("c"), 1]


def test_a_long_document_is_cut_behind_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SEGMENT_CHARACTERS", 8)
    text = "one\ntwo\nthree four five six\nx\n"
    assert "".join(tokens._segments(text)) == text
    assert next(iter(tokens._segments(text))) == "one\ntwo\n"
    assert max(map(len, tokens._segments(text))) <= 8


def test_tokens_are_made_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("ab")
    tokenizer = letters()
    for _ in range(2):
        assert tokenize_file(file, tokenizer, tmp_path / "cache").tolist() == [0, *ids("ab"), 1]
    assert tokenizer.calls == 1
    file.write_text("abc")
    os.utime(file, (1, 1))
    assert tokenize_file(file, tokenizer, tmp_path / "cache").tolist() == [0, *ids("abc"), 1]
    assert not list((tmp_path / "cache").glob("*.partial"))


def blocks(count: int, length: int = 4) -> PackedBlocks:
    return PackedBlocks(np.arange(count, dtype=np.int32), length)


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


def first_tokens(loader: Any) -> list[int]:
    return [int(row[0]) for batch in loader for row in batch["input_ids"]]


def test_ranks_share_an_epoch_without_overlap_and_shuffle_it_anew() -> None:
    packed = blocks(4 * 12)
    epochs = []
    for epoch in range(2):
        ranks = []
        for rank in range(3):
            loader, sampler = training_loader(packed, batch_size=2, rank=rank, world_size=3, seed=5)
            sampler.set_epoch(epoch)
            ranks.append(first_tokens(loader))
        assert sorted(functools.reduce(operator.iadd, ranks, [])) == list(range(0, 48, 4))
        epochs.append(ranks)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("count", "world_size", "batch_size"), [(12, 3, 2), (13, 3, 2), (1, 4, 2), (7, 2, 8)])
def test_evaluation_sees_each_block_once_and_each_rank_as_many_batches(
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
