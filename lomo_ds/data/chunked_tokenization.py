"""Tokenization of a document of any length in chunks, with the same result as tokenizing it at once.

A tokenizer that does not split text into words first takes far longer for a long text than for its chunks. But cutting
the text changes the tokens: such a tokenizer adds a space in front of every text, even if the cut is behind a line
break, and tokens that cross the cut are lost. Therefore, chunks overlap, and they are joined in the middle of a run of
tokens that both of them have. For BPE this is exact: a sequence of tokens is the tokenization of its text if every pair
of neighbours in it is the tokenization of that pair's text. For other tokenizers it is exact as long as tokens do not
depend on text farther away than the overlap reaches.
"""

from bisect import bisect_left
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

CHUNK = 2**16  # characters
OVERLAP = 2**11  # characters that a chunk shares with the next
AGREEMENT = 16  # tokens around a seam that must be equal in both chunks; for BPE, two would suffice

TokenArray = np.ndarray[tuple[int], np.dtype[np.int32]]
Chunk = tuple[list[int], list[tuple[int, int]]]  # ids, and the start and end of each token in the chunk's text


def token_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> TokenArray:
    """Return the token ids of ``document``, without begin and end tokens."""
    use_chunks = tokenizer.is_fast and len(document) > CHUNK + OVERLAP  # slow tokenizers give no token offsets
    parts = _tokenize_in_chunks(document, tokenizer) if use_chunks else None
    return _as_array(_tokenize(document, tokenizer)["input_ids"]) if parts is None else np.concatenate(parts)


def _tokenize_in_chunks(document: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenArray] | None:
    """Return the ids of each chunk between its two seams, or None if two chunks have no seam."""
    parts: list[TokenArray] = []
    chunk, begin = _tokenize_chunk(document, 0, tokenizer), 0
    for start in range(CHUNK, len(document) - OVERLAP, CHUNK):
        following = _tokenize_chunk(document, start, tokenizer)
        seam = _find_seam(chunk, following)
        if seam is None:
            return None
        parts.append(_as_array(chunk[0][begin : seam[0]]))
        chunk, begin = following, seam[1]
    return [*parts, _as_array(chunk[0][begin:])]


def _tokenize_chunk(document: str, start: int, tokenizer: PreTrainedTokenizerBase) -> Chunk:
    tokenized = _tokenize(document[start : start + CHUNK + OVERLAP], tokenizer, return_offsets_mapping=True)
    return tokenized["input_ids"], tokenized["offset_mapping"]


def _find_seam(chunk: Chunk, following: Chunk) -> tuple[int, int] | None:
    """Return the indices, in each chunk, of the shared token that is nearest to the middle of the overlap.

    ``AGREEMENT`` tokens around it must be equal in both chunks; None if there is no such token.
    """
    first = bisect_left(chunk[1], (CHUNK, 0))
    tokens = [
        (number, start - CHUNK, end - CHUNK)
        for number, (start, end) in zip(chunk[0][first:], chunk[1][first:], strict=True)
    ]
    last = bisect_left(following[1], (OVERLAP, 0))
    next_tokens = [(number, *offsets) for number, offsets in zip(following[0][:last], following[1][:last], strict=True)]
    index_of = {token: index for index, token in enumerate(next_tokens)}
    before = AGREEMENT // 2
    candidates = range(before, len(tokens) - before)
    for index in sorted(candidates, key=lambda index: abs(tokens[index][1] - OVERLAP // 2)):
        next_index = index_of.get(tokens[index], 0)
        surroundings = next_tokens[max(next_index - before, 0) : next_index + before]
        if tokens[index - before : index + before] == surroundings:
            return first + index, next_index
    return None


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _as_array(ids: list[int]) -> TokenArray:
    return np.asarray(ids, dtype=np.int32)
