"""Extraction of the loss from a model's output, with error messages for outputs that hold no usable loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError


def extract_loss(output: Any) -> Tensor:
    """Return the loss in a model's output: the tensor itself, ``["loss"]``, ``.loss``, or the scalar in a tuple.

    Returns:
        The loss, 0-dim.

    Raises:
        ConfigError: the output holds no loss, or the loss has no graph.
    """
    if isinstance(output, Tensor):
        return as_scalar(output)
    if isinstance(output, Mapping):
        return as_scalar(output.get("loss"))
    if hasattr(output, "loss"):
        return as_scalar(output.loss)
    if isinstance(output, list | tuple):
        return as_scalar(_loss_in_sequence(output))
    raise ConfigError(
        f"the model returned no loss, but a {type(output).__name__}; its forward must return a tensor, a tuple with "
        'one loss, a dict with "loss" or an object with .loss'
    )


def as_scalar(loss: Any) -> Tensor:
    """Return ``loss`` as a 0-dim tensor.

    Raises:
        ConfigError: the loss is not a single floating-point number, or it has no graph.
    """
    if loss is None:
        raise ConfigError(
            "the model returned no loss; labels must be in the batch, and the model's forward must use them"
        )
    if not isinstance(loss, Tensor):
        hint = "; pass its .loss" if isinstance(getattr(loss, "loss", None), Tensor) else ""
        raise ConfigError(f"a loss must be a tensor, got a {type(loss).__name__}{hint}")
    if loss.numel() != 1:
        raise ConfigError(
            f"a loss must be one number, got a tensor of shape {list(loss.shape)}; reduce it to its mean in the model"
        )
    if not loss.is_floating_point():
        raise ConfigError(f"a loss must have a floating-point dtype, got {str(loss.dtype).removeprefix('torch.')}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(
            "the loss depends on no trainable parameter; do not detach it or compute it under torch.no_grad()"
        )
    return loss.reshape(())


def _loss_in_sequence(items: list[Any] | tuple[Any, ...]) -> Tensor | None:
    """Return the only scalar with a graph in a tuple or list, or the only scalar if none has a graph."""
    losses = [item for item in items if isinstance(item, Tensor) and item.dim() == 0 and item.is_floating_point()]
    if torch.is_grad_enabled():
        losses = [loss for loss in losses if loss.requires_grad] or losses
    if len(losses) > 1:
        raise ConfigError(
            f"the model returned a {type(items).__name__} with {len(losses)} scalars that could be its loss; return a "
            'dict with "loss", and detach the other scalars'
        )
    if not losses and items and not any(isinstance(item, Tensor) for item in items):
        return None
    if not losses:
        shapes = ", ".join(str(list(item.shape)) for item in items if isinstance(item, Tensor))
        raise ConfigError(
            f"the model returned no loss, but a {type(items).__name__} of tensors of shapes {shapes}; labels must be "
            "in the batch, and one item must be the loss, a 0-dim tensor"
        )
    return losses[0]
