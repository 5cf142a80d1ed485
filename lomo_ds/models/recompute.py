"""Activations computed again in backward: only the input of each layer is kept, on the device or in host memory."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from lomo_ds.errors import ConfigError
from lomo_ds.models.activation_offload import ActivationOffload


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
        modules = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
        offloading = ActivationOffload(len(modules))

        def checkpoint(layer: Callable[..., Any], *inputs: Any) -> Any:  # which a copy of the model shares
            return offloading.checkpoint(layer, *inputs)

        for module in modules:
            module._gradient_checkpointing_func = checkpoint
