"""The micro-batches of a step as one batch, for layered accumulation: their rows, padded to the longest one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.distributed.collectives import all_reduce_min
from lomo_ds.engine.batches import Batch
from lomo_ds.engine.items import count_items, parse_num_items
from lomo_ds.errors import ConfigError
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


@dataclass(frozen=True)
class Agreement:
    """Knowledge that all ranks share about the micro-batches of a step.

    Attributes:
        reason: why they are not joined; None if all ranks join theirs.
        fewest, most: number of micro-batches of a rank.
    """

    reason: str | None
    fewest: int
    most: int

    def require_equal_numbers(self) -> None:
        """Raise on every rank if their numbers of micro-batches differ, which only layered accumulation allows."""
        if self.fewest != self.most:
            raise ConfigError(
                f"every rank needs the same number of micro-batches where they are not accumulated inside the layers "
                f"({self.reason}), got {self.fewest} on some rank and {self.most} on another"
            )


def agree_to_join(reason: str | None, count: int, process_group: ProcessGroup, device: torch.device) -> Agreement:
    """Agree with all ranks, since those that join their micro-batches call other collectives than those that do not.

    Args:
        reason: see ``reason_not_joined``.
        count: number of this rank's micro-batches.
    """
    if torch.distributed.get_world_size(process_group) == 1:
        return Agreement(reason, count, count)
    local = torch.tensor([reason is None, count, -count], dtype=torch.int64, device=device)
    all_join, fewest, minus_most = all_reduce_min(local, process_group).tolist()
    if not all_join and reason is None:
        reason = "those of another rank cannot be joined"
    return Agreement(reason, fewest, -minus_most)


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
    completed = _completed(micro_batches)
    if any(set(micro_batch) != set(completed[0]) for micro_batch in completed):
        return "they do not all have the same arguments"
    for name in completed[0]:
        values = [micro_batch[name] for micro_batch in completed]
        if not _are_equal(values) and not all(map(_has_value_for_each_token, values, completed)):
            return f"their {name} is not one value for each token"
    if num_items is not None:
        counts = [count_items(micro_batch, shifts) for micro_batch in micro_batches]
        if parse_num_items(num_items, len(micro_batches)) != counts:
            return "num_items are not the numbers of their labels"
    return None


def join(micro_batches: Sequence[Batch]) -> JoinedBatch:
    """Join micro-batches, for which ``reason_not_joined`` must be None."""
    completed = _completed(micro_batches)
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


def _completed(micro_batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Leave out arguments that are None, and give every micro-batch position_ids if one has them.

    Only those with several documents in a row need them.
    """
    given = [{name: value for name, value in batch.items() if value is not None} for batch in micro_batches]
    if any("position_ids" in batch for batch in given):
        for batch in given:
            tokens = batch["input_ids"]
            batch.setdefault("position_ids", torch.arange(tokens.shape[1], device=tokens.device)[None])
    return given


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _are_equal(values: list[Any]) -> bool:
    """Return whether plain values are the same for all micro-batches."""
    return all(isinstance(value, bool | int | float | str) and value == values[0] for value in values)


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
