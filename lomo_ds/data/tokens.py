"""One long array of token ids from a text file, made once a host and memory-mapped by all its ranks."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.text import read_documents
from lomo_ds.errors import DataError, one_line

SEGMENT_CHARACTERS = 2**22  # what is handed to the tokenizer at once
TokenArray = np.ndarray[tuple[int], np.dtype[np.int32]]


def tokenize_file(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> TokenArray:
    """All tokens of ``path``, each document between the tokenizer's begin and end tokens.

    Kept in ``cache`` under a name that tells file and tokenizer, so that a second run, or the other ranks of
    this host, map it instead of tokenizing again.

    Returns:
        1-D, int32, memory-mapped read-only.

    Raises:
        DataError: see ``read_documents``; or the tokenizer fails at a document; or ``cache`` cannot be written.
    """
    stored = cache / f"{path.stem[:50]}-{_fingerprint(path, tokenizer)}.npy"
    if not stored.exists():
        pieces = [np.asarray(ids, dtype=np.int32) for ids in _token_ids(path, tokenizer)]
        _store(np.concatenate(pieces), stored)
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


def _token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = tqdm(read_documents(path), desc=f"tokenizing {path.name}", unit=" documents", leave=False)
    for number, document in enumerate(documents, start=1):
        yield begin
        for segment in _segments(document):
            try:
                ids = tokenizer(segment, add_special_tokens=False, verbose=False)["input_ids"]
            except Exception as error:  # what tokenizers in Rust raise has no narrower class
                raise DataError(f"the tokenizer fails at document {number} of {path}: {one_line(error)}") from error
            yield ids
        yield end


def _segments(document: str) -> Iterator[str]:
    """Cut a long document behind line ends, where no token crosses."""
    start = 0
    while len(document) - start > SEGMENT_CHARACTERS:
        cut = document.rfind("\n", start, start + SEGMENT_CHARACTERS) + 1
        end = cut if cut > start else start + SEGMENT_CHARACTERS
        yield document[start:end]
        start = end
    yield document[start:]


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides the tokens: the file as it stands and the vocabulary."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(os.fsencode(path.resolve()) + f" {status.st_size} {status.st_mtime_ns}".encode())
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number} {token}\n".encode())
    return digest.hexdigest()[:16]
