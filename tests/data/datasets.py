"""Small datasets for tests: samples made of numbers, and files that are tokenized."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lomo_ds.data import IGNORE_INDEX, PackedSequences, RowSource, Samples, TokenizationOptions, load_samples
from lomo_ds.data.samples import RowCounts


def text_blocks(tokens: Any, length: int) -> PackedSequences:
    """Return blocks of ``length`` tokens of one text."""
    ids = np.asarray(tokens, dtype=np.int32)
    return PackedSequences(
        Samples(ids, ids, np.asarray([0, len(ids)]), np.zeros(1, np.uint8), RowCounts(rows=1)), length
    )


def make_samples(lengths: Sequence[int], prompts: Sequence[int] | None = None) -> Samples:
    """Return samples whose tokens are 0, 1, 2 and so on; the first ``prompts`` tokens of each have no label."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    ids = np.arange(starts[-1], dtype=np.int32)
    labels = ids.copy()
    for start, prompt in zip(starts, prompts or [0] * len(lengths), strict=False):
        labels[start : start + prompt] = IGNORE_INDEX
    return Samples(ids, labels, starts, np.ones(len(lengths), np.uint8), RowCounts(rows=len(lengths)))


def load(file: Path, tokenizer: Any, cache: Path | None = None, **options: Any) -> Samples:
    """Return the samples of a file, cached beside it by default."""
    return load_samples(source(file), tokenizer, cache or file.parent / "cache", TokenizationOptions(**options))


def source(*files: Path) -> RowSource:
    """Return the source of these files."""
    return RowSource(tuple(map(str, files)))


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """Write one JSON value a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
