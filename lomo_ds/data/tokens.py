"""One long array of token ids from a text file, made once a host and memory-mapped by all its ranks."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.chunked_tokenization import TokenArray, token_ids
from lomo_ds.data.fingerprint import fingerprint
from lomo_ds.data.text import read_documents
from lomo_ds.errors import DataError, one_line


def tokenize_file(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> TokenArray:
    """All tokens of ``path``, each document between the tokenizer's begin and end tokens.

    Kept in ``cache`` under a name that tells file and tokenizer, so that a second run, or the other ranks of this
    host, map it instead of tokenizing again.

    Returns:
        1-D, int32, memory-mapped read-only.

    Raises:
        DataError: see ``document_ids`` and ``fingerprint``; or ``cache`` cannot be written.
    """
    stored = cache / f"{path.stem[:50]}-{fingerprint(path, tokenizer)}.npy"
    if not stored.exists():
        _store(np.concatenate(list(document_ids(path, tokenizer))), stored)
    try:
        return np.load(stored, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{stored}, which keeps the tokens of {path}, is damaged ({error}); delete it") from None


def _store(tokens: TokenArray, path: Path) -> None:
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")  # hosts that share the folder may share process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"tokens cannot be kept in {path.parent}: {error.strerror}") from None


def document_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenArray]:
    """The token ids of each document in ``path``, between begin and end.

    Raises:
        DataError: see ``read_documents``; the tokenizer fails at a document, or has no token for any.
    """
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin, end = (np.asarray([] if mark is None else [mark], dtype=np.int32) for mark in marks)
    documents = tqdm(read_documents(path), desc=f"tokenizing {path.name}", unit=" documents", leave=False)
    empty = True
    for number, document in enumerate(documents, start=1):
        try:
            ids = token_ids(document, tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises any Exception, and a panic in Rust, which is none
            raise DataError(f"the tokenizer fails at document {number} of {path}: {one_line(error)}") from error
        empty = empty and not len(ids)
        yield np.concatenate([begin, ids, end])
    if empty:
        raise DataError(f"the tokenizer has no token for any text in {path}; it is not whole, or not for such text")
