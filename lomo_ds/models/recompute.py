"""Activations computed again in backward: only the input of each layer is kept, on the device or in host memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lomo_ds.errors import ConfigError


def recompute_activations(model: PreTrainedModel, offload: bool = False) -> None:
    """Checkpoint the activations of every layer of ``model``, without reentrant backwards.

    Args:
        offload: whether the inputs of layers are kept in host memory (pinned, on CUDA) until backward wants them.

    Raises:
        ConfigError: the model's architecture cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} cannot compute its activations again, so --gradient_checkpointing and "
            "--activation_offload do nothing for it; leave them out"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _checkpoint_in_host_memory


def _checkpoint_in_host_memory(layer: Callable[..., Any], *inputs: Any) -> Any:
    """A layer whose inputs leave the device; what it saves inside is dropped and computed again, as ever."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(layer, *inputs, use_reentrant=False)
