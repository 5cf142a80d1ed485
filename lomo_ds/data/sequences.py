"""Training sequences: a dataset of packed samples, and a mixture of several."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.data.packing import SIDE_BY_SIDE, Losses, Positions, Strategy, pack
from lomo_ds.data.samples import Samples
from lomo_ds.numerics.flat import ceil_div

DIGESTED = 256  # largest number of sequences that the digest covers
Item = dict[str, Tensor]


class Sequences(Protocol):
    """Training sequences of at most ``length`` tokens; item ``k`` has the arguments of the model's forward, 1-D."""

    length: int
    sizes: Positions  # tokens of each sequence, without padding
    has_documents: bool  # whether a sequence holds several samples that must not see each other

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def digest(self) -> str:
        """Return a checksum that distinguishes datasets without reading all tokens."""


class PackedSequences(Dataset[Item]):
    """Dataset of the sequences that ``pack`` forms of samples.

    Packed samples do not see each other: their ``position_ids`` restart at 0, by which transformers tells them apart
    in a batch without an attention mask, and the first token of each has no label. The rest of such a sequence is
    padding, a sample of its own without labels. The blocks of ``wrapped`` are one text each, padded at the end, where
    it has no effect on a causal model; and the samples of ``none`` are not padded.

    Args:
        chosen: the samples to take; all by default.
        length: tokens of a sequence at most.
    """

    def __init__(
        self, samples: Samples, length: int, strategy: Strategy = "wrapped", chosen: Positions | None = None
    ) -> None:
        self.samples = samples
        self.length = length
        self.strategy = strategy
        self.has_documents = strategy in SIDE_BY_SIDE
        self.losses: Losses
        self.pieces, self.losses = pack(
            samples, np.arange(len(samples)) if chosen is None else chosen, length, strategy
        )
        piece_sizes = self.pieces.stops - self.pieces.starts
        ends = np.concatenate([[0], np.cumsum(piece_sizes)])
        self.sizes = np.diff(ends[self.pieces.sequences])

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def padding(self) -> float:
        """Share of padding among the tokens of all sequences; 0 if they are padded only in a batch."""
        return 0.0 if self.strategy == "none" else 1 - float(self.sizes.mean()) / self.length

    def __getitem__(self, index: int) -> Item:
        """Return ``input_ids``, ``labels`` and, for packed samples, ``position_ids``; 1-D, int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first, last = self.pieces.sequences[index : index + 2]
        ranges = [
            slice(*ends) for ends in zip(self.pieces.starts[first:last], self.pieces.stops[first:last], strict=True)
        ]
        item = {
            "input_ids": _concatenate([self.samples.ids[tokens] for tokens in ranges]),
            "labels": _concatenate([self.samples.labels[tokens] for tokens in ranges]),
        }
        if self.has_documents:
            positions = torch.cat([torch.arange(tokens.stop - tokens.start) for tokens in ranges])
            item["labels"].masked_fill_(positions == 0, IGNORE_INDEX)
            item["position_ids"] = torch.cat([positions, torch.arange(self.length - len(positions))])
        return item if self.strategy == "none" else pad(item, self.length)

    def digest(self) -> str:
        """Return a checksum of the samples' division and of sampled sequences."""
        digest = hashlib.sha256(f"{self.strategy} {self.length} ".encode())
        digest.update(self.sizes.astype("<i8").tobytes())
        for index in range(0, len(self), ceil_div(len(self), DIGESTED)):
            for tensor in self[index].values():
                digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]


class Mixture(Dataset[Item]):
    """Dataset of several, each of whose sequences occurs ``weight`` times in an epoch.

    A weight of 2.5 takes every sequence twice, and every second one a third time.
    """

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float]) -> None:
        self.parts = parts
        self.length = max(part.length for part in parts)
        self.has_documents = any(part.has_documents for part in parts)
        counts = [max(1, round(weight * len(part))) for weight, part in zip(weights, parts, strict=True)]
        self.part_of = np.repeat(np.arange(len(parts)), counts)
        # evenly spread over the part, whose longest samples may come first
        self.index_of = np.concatenate(
            [np.arange(count) * len(part) // count for count, part in zip(counts, parts, strict=True)]
        )
        self.sizes = np.concatenate(
            [part.sizes[self.index_of[self.part_of == number]] for number, part in enumerate(parts)]
        )

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, index: int) -> Item:
        """Return one sequence; see ``PackedSequences``."""
        return self.parts[self.part_of[index]][int(self.index_of[index])]

    def digest(self) -> str:
        """Return a checksum of the parts and of how often each occurs."""
        digest = hashlib.sha256("".join(part.digest() for part in self.parts).encode())
        for indices in (self.part_of, self.index_of):
            digest.update(indices.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def pad(item: Item, length: int) -> Item:
    """Pad a sequence at its end with token 0, which has no label and is no continuation of the last sample."""
    missing = {name: length - len(tensor) for name, tensor in item.items()}
    values = {"labels": IGNORE_INDEX}
    return {
        name: torch.nn.functional.pad(tensor, (0, missing[name]), value=values.get(name, 0))
        for name, tensor in item.items()
    }


def collate(items: Sequence[Item]) -> Item:
    """Stack sequences as the rows of a batch, padded to the longest of them."""
    length = max(len(item["input_ids"]) for item in items)
    names = {name for item in items for name in item}
    rows = [pad(_with_positions(item) if "position_ids" in names else item, length) for item in items]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _with_positions(item: Item) -> Item:
    return {"position_ids": torch.arange(len(item["input_ids"]))} | item


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype("int64"))
