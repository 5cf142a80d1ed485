"""The loss of a step as an average over its tokens: what a micro-batch weighs, and where a model keeps its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.loss.loss_utils import ForCausalLMLoss

from lomo_ds.errors import ConfigError

IGNORE_INDEX = -100

Batch = Mapping[str, Any]


def micro_batches_of(batch: Batch | Sequence[Batch]) -> list[Batch]:
    """What ``train_batch`` is given, one micro-batch or several, as a list.

    Raises:
        ConfigError: it is empty.
    """
    micro_batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not micro_batches:
        raise ConfigError("train_batch needs at least one micro-batch, got an empty list")
    return micro_batches


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """``batch`` with its tensors on ``device``, or on their way there."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def loss_of(output: Any) -> Tensor:
    """The loss in what a model's forward returned: the tensor itself, ``.loss``, ``["loss"]`` or the first item."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["loss"]
    return output.loss if hasattr(output, "loss") else output[0]


def count_items(batch: Mapping[str, Any], shifts_labels: bool) -> int:
    """How many items the mean in the model's own loss is taken over.

    Integer labels other than -100 count; a causal language model predicts none of the first ones in each row.
    Without labels, or with real-valued ones, every row counts the same.
    """
    labels = batch["shift_labels"] if "shift_labels" in batch else batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return next(len(value) for value in batch.values() if isinstance(value, Tensor))
    if shifts_labels and "shift_labels" not in batch:
        labels = labels[..., 1:]
    return int((labels != IGNORE_INDEX).sum())


def shifts_labels(model: Module) -> bool:
    """Whether the model's loss compares each position with the label of the next (transformers' causal models)."""
    causal = getattr(model, "loss_type", None) == "ForCausalLM"
    return causal or getattr(model, "loss_function", None) is ForCausalLMLoss  # of GPT2LMHeadModel, which has no type


def with_any_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch without a single label, given some: it must run for the other ranks' sake, and weighs nothing.

    The mean over no labels would be nan, and nan times the weight 0 is nan too.
    """
    return {
        name: torch.zeros_like(value) if name in ("labels", "shift_labels") else value for name, value in batch.items()
    }
