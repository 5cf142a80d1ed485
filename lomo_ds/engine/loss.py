"""The loss in what a model's forward returned: one number to go backward from, or the reason why there is none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lomo_ds.errors import ConfigError


def extract_loss(output: Any) -> Tensor:
    """Find the loss in a model's output: the tensor itself, ``["loss"]``, ``.loss``, or the one in a tuple.

    Returns:
        0-dim.

    Raises:
        ConfigError: there is none, or nothing can go backward from it.
    """
    if isinstance(output, Tensor):
        return as_scalar(output)
    if isinstance(output, Mapping):
        return as_scalar(output.get("loss"))
    if hasattr(output, "loss"):
        return as_scalar(output.loss)
    if isinstance(output, list | tuple):
        return as_scalar(_loss_among(output))
    raise ConfigError(
        f"the model returned no loss, but a {type(output).__name__}; its forward must return a tensor, a tuple that "
        'holds one loss, a dict with "loss" or an object with .loss'
    )


def as_scalar(loss: Any) -> Tensor:
    """``loss`` as a 0-dim tensor.

    Raises:
        ConfigError: it is not one number, or nothing can go backward from it.
    """
    if loss is None:
        raise ConfigError(
            "the model returned no loss; labels must be in the batch, and its forward must make use of them"
        )
    if not isinstance(loss, Tensor):
        hint = "; give its .loss" if isinstance(getattr(loss, "loss", None), Tensor) else ""
        raise ConfigError(f"a loss must be a tensor, got a {type(loss).__name__}{hint}")
    if loss.numel() != 1:
        raise ConfigError(
            f"a loss must be one number, got a tensor of shape {list(loss.shape)}; reduce it to its mean in the model"
        )
    if not loss.is_floating_point():
        raise ConfigError(f"a loss must be of floats, got {str(loss.dtype).removeprefix('torch.')}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(
            "the loss depends on no parameter that trains; do not detach it, nor compute it under torch.no_grad()"
        )
    return loss.reshape(())


def _loss_among(items: list[Any] | tuple[Any, ...]) -> Tensor | None:
    """Of what a tuple holds, the one number with a graph; without graphs, the one number."""
    losses = [item for item in items if isinstance(item, Tensor) and item.dim() == 0 and item.is_floating_point()]
    if torch.is_grad_enabled():
        losses = [loss for loss in losses if loss.requires_grad] or losses
    if len(losses) > 1:
        raise ConfigError(
            f"the model returned a {type(items).__name__} with {len(losses)} numbers that may be its loss; return a "
            'dict with "loss", and detach the others'
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
