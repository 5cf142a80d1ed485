"""Samples: the tokens and labels of all examples of a source, cached once per host and memory-mapped by its ranks."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.data.fingerprint import fingerprint
from lomo_ds.data.formats import KINDS, Chat, Example, Text, detect_format, is_empty, parse_row
from lomo_ds.data.rows import Row, RowSource
from lomo_ds.data.tokens import Labelled, TokenizationOptions, tokenize_example
from lomo_ds.errors import DataError, one_line

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
Kinds = np.ndarray[tuple[int], np.dtype[np.uint8]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Sample = tuple[str, type[Example], Labelled]  # the location of its row, its kind, and its ids and labels
ROWS = "rows.json"


@dataclass
class RowCounts:
    """Rows that were read from a source, and those among them that are no sample."""

    rows: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str = ""  # the error of the first bad row


@dataclass(frozen=True)
class Samples:
    """Token ids and labels of all examples of a source; the arrays are memory-mapped.

    Attributes:
        ids: of all samples, one behind the other; int32.
        labels: of each token itself, not of the next; -100 where it is not trained; int32.
        starts: where each sample begins, and the end of the last one; int64.
        kinds: of the example that each sample was, as its position in ``KINDS``; uint8.
    """

    ids: TokenArray
    labels: TokenArray
    starts: Positions
    kinds: Kinds
    counts: RowCounts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def are(self, kind: type[Example]) -> Mask:
        """Return for each sample whether it was an example of ``kind``."""
        return self.kinds == KINDS.index(kind)


def load_samples(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, cache: Path, options: TokenizationOptions
) -> Samples:
    """Return all samples of ``source``.

    They are stored in ``cache`` under a name that identifies the files, the tokenizer and the options, so that a second
    run and the other ranks of this host map them instead of tokenizing again.

    Raises:
        DataError: see ``read_samples`` and ``fingerprint``; there is no sample; or ``cache`` cannot be written.
    """
    folder = cache / f"{source.stem}-{fingerprint(source, tokenizer, dataclasses.asdict(options))}"
    if not folder.exists():
        counts = RowCounts()
        samples = list(read_samples(source, tokenizer, options, counts))
        _check_not_empty(samples, source, counts, tokenizer)
        _store(samples, counts, folder)
    try:
        ids, starts, kinds = (_load(folder / f"{name}.npy") for name in ("ids", "starts", "kinds"))
        labels = _load(folder / "labels.npy") if (folder / "labels.npy").exists() else ids
        return Samples(ids, labels, starts, kinds, RowCounts(**json.loads((folder / ROWS).read_text(encoding="utf-8"))))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(f"{folder}, which caches the tokens of {source}, is damaged ({error}); delete it") from None


def read_samples(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions, counts: RowCounts
) -> Iterator[Sample]:
    """Yield the sample of each example that is not empty; count the rows in ``counts``.

    Raises:
        DataError: the source cannot be read, a row is malformed (unless such rows are skipped), or the tokenizer fails.
    """

    def on_bad_row(error: DataError) -> None:
        if options.on_bad_rows == "error":
            raise DataError(f"{error}; --on_bad_rows skip leaves such rows out") from error
        counts.rows += 1
        counts.bad += 1
        counts.first_bad = counts.first_bad or str(error)

    with tqdm(desc=f"tokenizing {source}", unit=" rows", leave=False) as progress:
        for row, example in read_examples(source, options, on_bad_row):
            progress.update()
            if is_empty(example):
                counts.empty += 1
            elif labelled := _tokenize(row, example, tokenizer, options, on_bad_row):
                yield row.location, type(example), labelled
            else:
                continue
            counts.rows += 1


def read_examples(
    source: RowSource, options: TokenizationOptions, on_bad_row: Callable[[DataError], None]
) -> Iterator[tuple[Row, Example]]:
    """Yield each row of ``source`` with its example; the format of each file is that of its first row."""
    for rows in source.rows_by_part(on_bad_row):
        first = next(rows, None)
        if first is None:
            continue
        name = options.dataset_format or detect_format(first, options.text_field)
        for row in itertools.chain([first], rows):
            try:
                example = parse_row(row, name, options.text_field)
            except DataError as error:
                on_bad_row(error)
            else:
                yield row, example


def needs_chat_template(source: RowSource, options: TokenizationOptions) -> bool:
    """Return whether the first example of a file in ``source`` is a conversation."""
    parts = source.rows_by_part(lambda error: None, without_texts=True)
    return any(_begins_with_chat(rows, options) for rows in parts)


def _begins_with_chat(rows: Iterator[Row], options: TokenizationOptions) -> bool:
    with contextlib.suppress(DataError):  # reported when all rows are read, which they need not be if they are cached
        for row in rows:
            with contextlib.suppress(DataError):
                name = options.dataset_format or detect_format(row, options.text_field)
                return isinstance(parse_row(row, name, options.text_field), Chat)
    return False


def _tokenize(
    row: Row,
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizationOptions,
    on_bad_row: Callable[[DataError], None],
) -> Labelled | None:
    """Return the tokens of an example, or None if its chat template does not fit it, and that is not an error."""
    try:
        return tokenize_example(example, tokenizer, options)
    except DataError as error:
        on_bad_row(DataError(f"{row.location}: {error}"))
        return None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises any Exception, and Rust panics, which are not Exceptions
        raise DataError(f"the tokenizer fails at {row.location}: {one_line(error)}") from error


def _check_not_empty(
    samples: list[Sample], source: RowSource, counts: RowCounts, tokenizer: PreTrainedTokenizerBase
) -> None:
    if not samples:
        bad = f", {counts.bad} are malformed, the first: {counts.first_bad}" if counts.bad else ""
        raise DataError(f"{source} holds no example to train on: of {counts.rows} rows {counts.empty} are empty{bad}")
    marks = sum(mark is not None for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    if all(kind is Text and len(ids) <= marks for _, kind, (ids, _) in samples):
        raise DataError(
            f"the tokenizer has no token for any text in {source}; it is incomplete or not made for such text"
        )


def _store(samples: list[Sample], counts: RowCounts, folder: Path) -> None:
    partial = folder.with_name(f"{uuid.uuid4().hex}.partial")  # process ids may repeat on hosts that share the folder
    ids, labels = (np.concatenate([labelled[part] for *_, labelled in samples]) for part in (0, 1))
    arrays: dict[str, np.ndarray] = {
        "ids": ids,
        "starts": np.cumsum([0, *(len(sample_ids) for *_, (sample_ids, _) in samples)], dtype=np.int64),
        "kinds": np.asarray([KINDS.index(kind) for _, kind, _ in samples], dtype=np.uint8),
    }
    if not np.array_equal(ids, labels):
        arrays["labels"] = labels
    try:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        (partial / ROWS).write_text(json.dumps(dataclasses.asdict(counts)), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # another host that shares the cache may have been faster
            raise DataError(f"tokens cannot be cached in {folder.parent}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)
