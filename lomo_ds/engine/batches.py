"""Micro-batches: validation of the caller's batches, transfer to a device, and dummy labels for empty ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError

Batch = Mapping[str, Any]


def as_micro_batches(batch: Batch | Sequence[Batch]) -> list[Batch]:
    """Return the batch argument of ``train_batch`` as a list of micro-batches.

    Raises:
        ConfigError: the list is empty, or an item is not a dict of arguments for the model's forward.
    """
    micro_batches: list[Any] = list(batch) if isinstance(batch, list | tuple) else [batch]
    if not micro_batches:
        raise ConfigError("train_batch needs at least one micro-batch, got an empty list")
    for micro_batch in micro_batches:
        _validate_micro_batch(batch, micro_batch)
    return micro_batches


def move_to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors nested in ``value`` to ``device``; the copies may be asynchronous."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: move_to_device(item, device) for name, item in value.items()}
    if callable(getattr(value, "to", None)):  # for example torch's PackedSequence
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move_to_device(item, device) for item in value))
    return type(value)(move_to_device(item, device) for item in value) if type(value) in (list, tuple) else value


def with_dummy_labels(batch: Batch) -> Batch:
    """Replace the labels of a micro-batch in which every label is ignored, so that it can run with loss weight 0.

    It must run because the other ranks wait in its collectives. Without labels its mean loss would be nan, which a
    weight of 0 does not remove.
    """
    return {
        name: torch.zeros_like(value) if name in ("labels", "shift_labels") and isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _validate_micro_batch(batch: Any, micro_batch: Any) -> None:
    rule = "train_batch needs batches with the named arguments of the model's forward"
    if not isinstance(micro_batch, Mapping):
        got = type(batch).__name__
        if isinstance(batch, list | tuple):
            got += f" of {', '.join(dict.fromkeys(type(item).__name__ for item in batch))}"
        raise ConfigError(
            f'{rule}, got a {got}; give a dict such as {{"input_ids": x, "labels": y}}, or a list of such dicts, one '
            "per micro-batch"
        )
    invalid_keys = [name for name in micro_batch if not isinstance(name, str)]
    if invalid_keys:
        raise ConfigError(f"{rule}, got the key {invalid_keys[0]!r} in a batch; use an argument name for every key")
    if micro_batch.get("num_items_in_batch") is not None:
        raise ConfigError(
            "a batch must not hold num_items_in_batch, which makes a transformers model divide the sum of its losses "
            "by it; train_batch needs the mean loss and weights it itself, so leave num_items_in_batch out"
        )
