"""Causal language models on the meta device: their modules, shapes and tied parameters, without memory for weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lomo_ds.errors import ModelError
from lomo_ds.models.files import first_line


def meta_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of ``config`` with parameters on the meta device and non-persistent buffers computed.

    Raises:
        ModelError: transformers, or the model's own code, cannot build the model.
    """
    try:
        return _on_meta(partial(AutoModelForCausalLM.from_config, config, trust_remote_code=trust_remote_code), dtype)
    except Exception as error:  # any kind: contradictory sizes, unknown names, missing packages
        name = config.name_or_path or f"a {config.model_type} configuration"
        raise ModelError(f"no model can be built from {name}: {first_line(error)}") from error


def meta_model_of_class(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model of ``model_class`` like ``meta_model`` does."""
    return _on_meta(partial(model_class._from_config, config), dtype)


def _on_meta(build: Callable[..., PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    with no_init_weights(), _parameters_on_meta():
        model = build(dtype=dtype)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # some models declare float32 parameters regardless of dtype
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)  # computes the buffers, as in transformers' own loading
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when it is registered; buffers and other tensors stay on their device.

    A model's own code may compute buffers and other constants only in ``__init__``, so these must be real tensors.
    """
    register = Module.register_parameter

    def register_on_meta(module: Module, name: str, parameter: Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = Parameter(parameter.to("meta"), parameter.requires_grad)

    Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Module.register_parameter = register  # type: ignore[method-assign]


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every tensor that a model's files hold, on the meta device, keyed by name; tied ones once."""
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the persistent buffers of a model, keyed by name."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if name not in computed}
