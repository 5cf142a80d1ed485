"""A dataset of training sequences: blocks of equal length, cut from one long token array."""

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.numerics.flat import ceil_div

DIGESTED = 256  # largest number of blocks that the digest covers

IGNORE_INDEX = -100  # label that the loss ignores, as in torch.nn.functional.cross_entropy


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Dataset of sequences of ``length`` tokens that are their own labels; the last one may be padded.

    A block may hold several documents, separated only by their begin and end tokens.
    """

    def __init__(self, tokens: TokenArray, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return ceil_div(len(self.tokens), self.length)

    def digest(self) -> str:
        """Return a checksum of sampled blocks, which distinguishes texts without reading all tokens."""
        digest = hashlib.sha256()
        for index in range(0, len(self), ceil_div(len(self), DIGESTED)):
            digest.update(self.tokens[index * self.length : (index + 1) * self.length].astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, both (length,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype("int64"))
        missing = self.length - len(block)
        return {
            # padding at the end of a causal model's sequence does not affect the tokens before it
            "input_ids": torch.nn.functional.pad(block, (0, missing)),
            "labels": torch.nn.functional.pad(block, (0, missing), value=IGNORE_INDEX),
        }
