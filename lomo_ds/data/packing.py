"""Token blocks of one length, cut from a long token array, as a dataset of training sequences."""

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.numerics.flat import ceil_div

DIGESTED = 256  # blocks, at most

IGNORE_INDEX = -100  # the label that no loss counts, as in torch.nn.functional.cross_entropy


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Sequences of ``length`` tokens that are their own labels; the last may be filled up with ignored ones.

    Documents follow one another in a block, told apart by the begin and end tokens only.
    """

    def __init__(self, tokens: TokenArray, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return ceil_div(len(self.tokens), self.length)

    def digest(self) -> str:
        """A checksum of tokens here and there, which tells one text from another without reading all of it."""
        digest = hashlib.sha256()
        for index in range(0, len(self), ceil_div(len(self), DIGESTED)):
            digest.update(self.tokens[index * self.length : (index + 1) * self.length].astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, both (length,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype("int64"))
        missing = self.length - len(block)
        return {
            # what fills up a causal model's sequence behind its end changes nothing before it
            "input_ids": torch.nn.functional.pad(block, (0, missing)),
            "labels": torch.nn.functional.pad(block, (0, missing), value=IGNORE_INDEX),
        }
