"""A causal language model without memory: its modules, shapes and ties, on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def meta_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of ``config``: parameters on the meta device, what is in no file (rotary frequencies) computed."""
    with no_init_weights(), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return _finished(model, dtype)


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the class, configuration and dtype of ``model``, as ``meta_model`` makes it."""
    with no_init_weights(), _parameters_on_meta():
        copy = type(model)._from_config(model.config, dtype=model.dtype)
    return _finished(copy, model.dtype)


def _finished(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # some models declare one in float32, whatever they are asked for
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)  # as transformers does when it loads a model
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let parameters have no memory from the moment modules hold them; all else is computed where it usually is.

    Code that comes with a model may compute buffers, and constants that are none, in ``__init__`` alone.
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
    """Every tensor that a meta model's files hold, on the meta device, by name; tied ones once."""
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that a model's files hold, by name."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if name not in computed}
