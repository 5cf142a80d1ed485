"""Micro-batches as a model's forward takes them: read from what a caller gives, moved to a device, made to run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError

Batch = Mapping[str, Any]


def as_micro_batches(batch: Batch | Sequence[Batch]) -> list[Batch]:
    """List the micro-batches of what ``train_batch`` is given, one or several.

    Raises:
        ConfigError: it is empty, or does not name the arguments of the model's forward.
    """
    micro_batches: list[Any] = list(batch) if isinstance(batch, list | tuple) else [batch]
    if not micro_batches:
        raise ConfigError("train_batch needs at least one micro-batch, got an empty list")
    for micro_batch in micro_batches:
        _validate_micro_batch(batch, micro_batch)
    return micro_batches


def move_to_device(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors within it on ``device``, or on their way there."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: move_to_device(item, device) for name, item in value.items()}
    if callable(getattr(value, "to", None)):  # such as torch's PackedSequence
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move_to_device(item, device) for item in value))
    return type(value)(move_to_device(item, device) for item in value) if type(value) in (list, tuple) else value


def with_dummy_labels(batch: Batch) -> Batch:
    """A micro-batch without a single label, given some: it must run for the other ranks' sake, and weighs nothing.

    The mean over no labels would be nan, and nan times the weight 0 is nan too.
    """
    return {
        name: torch.zeros_like(value) if name in ("labels", "shift_labels") and isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _validate_micro_batch(batch: Any, micro_batch: Any) -> None:
    rule = "train_batch needs the arguments of the model's forward by name"
    if not isinstance(micro_batch, Mapping):
        got = type(batch).__name__
        if isinstance(batch, list | tuple):
            got += f" of {', '.join(dict.fromkeys(type(item).__name__ for item in batch))}"
        raise ConfigError(
            f'{rule}, got a {got}; give a dict such as {{"input_ids": x, "labels": y}}, or a list of them, one for '
            "each micro-batch"
        )
    strangers = [name for name in micro_batch if not isinstance(name, str)]
    if strangers:
        raise ConfigError(f"{rule}, got the key {strangers[0]!r} in a batch; let every key be a parameter's name")
    if micro_batch.get("num_items_in_batch") is not None:
        raise ConfigError(
            "a batch holds num_items_in_batch, by which a transformers model divides the sum of its losses, and "
            "train_batch needs their mean, which it weighs itself; leave num_items_in_batch out"
        )
