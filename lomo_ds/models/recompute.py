"""Activation checkpointing: only the input of each layer is kept until backward, on the device or in host memory."""

from transformers import PreTrainedModel

from lomo_ds.errors import ConfigError
from lomo_ds.models.activation_offload import ActivationOffload


def recompute_activations(model: PreTrainedModel, offload: bool = False) -> None:
    """Enable non-reentrant activation checkpointing for every layer of ``model``.

    Args:
        offload: whether to keep the inputs of layers in host memory (pinned on CUDA) until backward needs them.

    Raises:
        ConfigError: the model does not support activation checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing, which --gradient_checkpointing and "
            "--activation_offload need; leave them out"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        modules = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
        offloading = ActivationOffload(len(modules))
        for module in modules:
            module._gradient_checkpointing_func = offloading
