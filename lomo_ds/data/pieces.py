"""The tokens of a document of any length, made piece by piece and yet those of the whole.

A tokenizer that does not split text into words first takes far longer for a long text than for its pieces. But a piece
cut anywhere, even behind a line, gains the space that such a tokenizer puts before every text, and tokens that cross
the cut are lost. So pieces overlap, and are joined amid tokens that both have. In BPE a sequence of tokens is that of
its text if all neighbours in it are neighbours in texts' sequences, so this is exact; elsewhere, as exact as tokens
depend on text no farther from them than the overlap reaches.
"""

from bisect import bisect_left
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

PIECE = 2**16  # characters
OVERLAP = 2**11  # characters that a piece shares with the next
AGREEMENT = 16  # tokens around a seam that both pieces must have; of BPE two would do

TokenArray = np.ndarray[tuple[int], np.dtype[np.int32]]
Piece = tuple[list[int], list[tuple[int, int]]]  # ids, and where in the piece each token begins and ends


def token_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> TokenArray:
    """The token ids of ``document``, without begin and end."""
    in_pieces = tokenizer.is_fast and len(document) > PIECE + OVERLAP  # others do not say where a token begins
    pieces = _joined_pieces(document, tokenizer) if in_pieces else None
    return _ids(_tokenized(document, tokenizer)["input_ids"]) if pieces is None else np.concatenate(pieces)


def _joined_pieces(document: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenArray] | None:
    """The ids of each piece from its seam with the last to that with the next; None where there is no seam."""
    joined: list[TokenArray] = []
    piece, begin = _piece(document, 0, tokenizer), 0
    for start in range(PIECE, len(document) - OVERLAP, PIECE):
        following = _piece(document, start, tokenizer)
        seam = _seam(piece, following)
        if seam is None:
            return None
        joined.append(_ids(piece[0][begin : seam[0]]))
        piece, begin = following, seam[1]
    return [*joined, _ids(piece[0][begin:])]


def _piece(document: str, start: int, tokenizer: PreTrainedTokenizerBase) -> Piece:
    tokenized = _tokenized(document[start : start + PIECE + OVERLAP], tokenizer, return_offsets_mapping=True)
    return tokenized["input_ids"], tokenized["offset_mapping"]


def _seam(piece: Piece, following: Piece) -> tuple[int, int] | None:
    """The index, in either piece, of a token amid those that they share, as near the overlap's middle as can be."""
    first = bisect_left(piece[1], (PIECE, 0))
    tokens = [
        (number, start - PIECE, end - PIECE)
        for number, (start, end) in zip(piece[0][first:], piece[1][first:], strict=True)
    ]
    last = bisect_left(following[1], (OVERLAP, 0))
    others = [(number, *place) for number, place in zip(following[0][:last], following[1][:last], strict=True)]
    index_of = {token: index for index, token in enumerate(others)}
    before = AGREEMENT // 2
    candidates = range(before, len(tokens) - before)
    for index in sorted(candidates, key=lambda index: abs(tokens[index][1] - OVERLAP // 2)):
        other = index_of.get(tokens[index], 0)
        agreed = others[max(other - before, 0) : other + before]
        if tokens[index - before : index + before] == agreed:
            return first + index, other
    return None


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _ids(ids: list[int]) -> TokenArray:
    return np.asarray(ids, dtype=np.int32)
