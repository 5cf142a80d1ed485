"""The micro-batches of a step as one batch, for layered accumulation: their rows, padded to the longest one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.engine.batches import Batch
from lomo_ds.engine.items import count_items, parse_num_items
from lomo_ds.models.layered import MicroBatch

# What stands in the padding. No layer sees it, so a mask of ones stays one that needs no computation.
PADDING = {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "attention_mask": 1}


@dataclass(frozen=True)
class JoinedBatch:
    """All rows of a step on this rank.

    Attributes:
        batch: the arguments of the model's forward.
        micro_batches: where its rows belong.
    """

    batch: Batch
    micro_batches: list[MicroBatch]


def reason_not_joined(
    micro_batches: Sequence[Batch], num_items: int | Sequence[int] | None, shifts: bool | None
) -> str | None:
    """Return the reason why micro-batches cannot be joined; None if they can.

    Args:
        num_items: see ``LomoEngine.train_batch``.
        shifts: whether the model shifts labels, see ``items``.
    """
    if not all(_is_matrix(micro_batch.get("input_ids")) for micro_batch in micro_batches):
        return "they need input_ids of shape (rows, tokens)"
    if any(micro_batch.get("use_cache") for micro_batch in micro_batches):
        return "with use_cache they would see each other's keys and values"
    completed = _with_position_ids(micro_batches)
    names = set(completed[0])
    if any(set(micro_batch) != names for micro_batch in completed):
        return "they do not all have the same arguments"
    for name in names:
        values = [micro_batch[name] for micro_batch in completed]
        if not _are_equal(values) and not all(map(_has_value_for_each_token, values, completed)):
            return f"their {name} is not one value for each token"
    counts = [count_items(micro_batch, shifts) for micro_batch in micro_batches]
    if num_items is not None and parse_num_items(num_items, len(micro_batches)) != counts:
        return "num_items are not the numbers of their labels"
    return None


def join(micro_batches: Sequence[Batch]) -> JoinedBatch:
    """Join micro-batches, for which ``reason_not_joined`` must be None."""
    completed = _with_position_ids(micro_batches)
    places: list[MicroBatch] = []
    for micro_batch in completed:
        rows, length = micro_batch["input_ids"].shape
        start = places[-1].stop if places else 0
        places.append(MicroBatch(start, start + rows, length))
    longest = max(place.length for place in places)
    joined: dict[str, Any] = {}
    for name, value in completed[0].items():
        if isinstance(value, Tensor):
            parts = (_padded(name, batch[name], batch["input_ids"].shape[0], longest) for batch in completed)
            joined[name] = torch.cat(list(parts))
        else:
            joined[name] = value
    return JoinedBatch(joined, places)


def _with_position_ids(micro_batches: Sequence[Batch]) -> list[Batch]:
    """Give every micro-batch position_ids if one has them: only those with several documents in a row need them."""
    if all(micro_batch.get("position_ids") is None for micro_batch in micro_batches):
        return list(micro_batches)
    return [
        batch
        if batch.get("position_ids") is not None
        else {
            **batch,
            "position_ids": torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)[None],
        }
        for batch in micro_batches
    ]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _are_equal(values: list[Any]) -> bool:
    """Return whether values other than tensors are the same for all micro-batches."""
    return not any(isinstance(value, Tensor) for value in values) and all(value == values[0] for value in values)


def _has_value_for_each_token(value: Any, micro_batch: Batch) -> bool:
    rows, length = micro_batch["input_ids"].shape
    return isinstance(value, Tensor) and value.shape in ((rows, length), (1, length))


def _padded(name: str, value: Tensor, rows: int, length: int) -> Tensor:
    """Return ``value``, (rows or 1, tokens), as a tensor of (``rows``, ``length``)."""
    value = value.expand(rows, -1)
    missing = length - value.shape[1]
    if name != "position_ids":
        return pad(value, (0, missing), value=PADDING.get(name, 0))
    continued = value[:, -1:] + torch.arange(1, missing + 1, device=value.device)  # a restart would begin a document
    return torch.cat([value, continued], dim=1)
