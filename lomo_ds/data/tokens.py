"""Tokenization of a text file into one long array, cached once per host and memory-mapped by its ranks."""

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
    """Return all tokens of ``path``, with the tokenizer's begin and end tokens around each document.

    The array is stored in ``cache`` under a name that identifies the file and tokenizer, so that a second run and the
    other ranks of this host map it instead of tokenizing again.

    Returns:
        1-D, int32, memory-mapped read-only.

    Raises:
        DataError: see ``document_ids`` and ``fingerprint``; or ``cache`` cannot be written.
    """
    cached = cache / f"{path.stem[:50]}-{fingerprint(path, tokenizer)}.npy"
    if not cached.exists():
        _store(np.concatenate(list(document_ids(path, tokenizer))), cached)
    try:
        return np.load(cached, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{cached}, which caches the tokens of {path}, is damaged ({error}); delete it") from None


def _store(tokens: TokenArray, path: Path) -> None:
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")  # process ids may repeat on hosts that share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"tokens cannot be cached in {path.parent}: {error.strerror}") from None


def document_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenArray]:
    """Yield the token ids of each document in ``path``, with begin and end tokens.

    Raises:
        DataError: see ``read_documents``; or the tokenizer fails at a document or gives no tokens for all of them.
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
        except BaseException as error:  # tokenizers raises any Exception, and Rust panics, which are not Exceptions
            raise DataError(f"the tokenizer fails at document {number} of {path}: {one_line(error)}") from error
        empty = empty and not len(ids)
        yield np.concatenate([begin, ids, end])
    if empty:
        raise DataError(
            f"the tokenizer has no token for any text in {path}; it is incomplete or not made for such text"
        )
