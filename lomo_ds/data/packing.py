"""Packing: which pieces of which samples form a training sequence, by TRL's strategies.

``bfd`` (best-fit decreasing, arXiv 2404.10830) puts whole samples side by side, each cut off at the sequence length;
``bfd_split`` splits long samples instead; ``wrapped`` cuts the stream of all tokens, wherever samples end; and ``none``
makes each sample a sequence of its own.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.data.samples import Positions, Samples

Strategy = Literal["none", "bfd", "bfd_split", "wrapped"]
SIDE_BY_SIDE: tuple[Strategy, ...] = ("bfd", "bfd_split")  # these put samples that must not see each other in a row


@dataclass(frozen=True)
class Pieces:
    """Ranges of tokens, in the order of the sequences that they form.

    Attributes:
        starts, stops: the range of each piece in the tokens of all samples; int64.
        sequences: the first piece of each sequence, and the number of pieces; int64.
    """

    starts: Positions
    stops: Positions
    sequences: Positions


@dataclass(frozen=True)
class Losses:
    """Counts of what packing leaves out.

    Attributes:
        cut_samples, cut_tokens: samples that are cut off, and their tokens beyond the length.
        unlabelled_samples: samples that have no label within the length.
        unlabelled_tokens: tokens of these, and of pieces of other samples without a label.
    """

    cut_samples: int = 0
    cut_tokens: int = 0
    unlabelled_samples: int = 0
    unlabelled_tokens: int = 0


def pack(samples: Samples, chosen: Positions, length: int, strategy: Strategy) -> tuple[Pieces, Losses]:
    """Return the pieces of the ``chosen`` samples that form sequences of at most ``length`` tokens.

    Pieces without a label that the model can predict are left out, except by ``wrapped``.
    """
    starts, stops = samples.starts[chosen], samples.starts[chosen + 1]
    if strategy == "wrapped":
        return _wrap(starts, stops, length), Losses()
    which = np.arange(len(starts))  # of the samples each piece is of
    if strategy == "bfd_split":
        which, starts, stops = _split(starts, stops, length)
    cut = np.maximum(stops - starts - length, 0)
    stops = stops - cut
    kept = _has_labels(samples.labels, starts, stops)
    losses = Losses(
        cut_samples=int((cut > 0).sum()),
        cut_tokens=int(cut.sum()),
        unlabelled_samples=len(chosen) - len(np.unique(which[kept])),
        unlabelled_tokens=int((stops - starts)[~kept].sum()),
    )
    starts, stops = starts[kept], stops[kept]
    if strategy == "none":
        return Pieces(starts, stops, np.arange(len(starts) + 1)), losses
    order, sequences = best_fit_decreasing(stops - starts, length)
    return Pieces(starts[order], stops[order], sequences), losses


def best_fit_decreasing(lengths: Positions, capacity: int) -> tuple[Positions, Positions]:
    """Distribute items over bins: each, from the longest, goes into the bin that it leaves the least space in.

    Args:
        lengths: of the items, each at most ``capacity``.

    Returns:
        The items in the order of the bins, and the position of each bin's first item, with the number of items.
    """
    bins: list[list[int]] = []
    bins_with: defaultdict[int, deque[int]] = defaultdict(deque)  # bins by their space, oldest first
    spaces = 0  # bit s is set if a bin has space s
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit is the smallest space
            number = bins_with[space].popleft()
            spaces ^= 0 if bins_with[space] else 1 << space
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if space > length:
            bins_with[space - length].append(number)
            spaces |= 1 << (space - length)
    order = np.asarray([item for items in bins for item in items], dtype=np.int64)
    return order, np.cumsum([0, *map(len, bins)], dtype=np.int64)


def _split(starts: Positions, stops: Positions, length: int) -> tuple[Positions, Positions, Positions]:
    """Split every range into pieces of ``length`` tokens and a shorter last one; return which range each is of, too."""
    counts = (stops - starts + length - 1) // length
    which = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(which)) - (np.cumsum(counts) - counts)[which]  # of the piece in its range
    pieces = starts[which] + number * length
    return which, pieces, np.minimum(pieces + length, stops[which])


def _wrap(starts: Positions, stops: Positions, length: int) -> Pieces:
    """Cut the stream of all ranges, one behind the other, into sequences of ``length`` tokens."""
    ends = np.cumsum(stops - starts)
    total = int(ends[-1])
    sequence_starts = np.arange(0, total, length)
    cuts = np.union1d(sequence_starts, ends)  # 0, every end of a range or a sequence, and the total
    which = np.searchsorted(ends, cuts[:-1], side="right")
    pieces = stops[which] - ends[which] + cuts[:-1]
    sequences = np.append(np.searchsorted(cuts, sequence_starts), len(pieces))
    return Pieces(pieces, pieces + np.diff(cuts), sequences)


def _has_labels(labels: TokenArray, starts: Positions, stops: Positions) -> np.ndarray:
    """Return for each range whether a token behind its first, which nothing predicts, has a label."""
    trained = np.append(labels != IGNORE_INDEX, False)
    limits = np.stack([np.minimum(starts + 1, stops), stops], axis=1).ravel()
    return np.logical_or.reduceat(trained, limits)[::2] & (stops - starts > 1)
