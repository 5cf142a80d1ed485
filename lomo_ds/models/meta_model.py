"""A causal language model without memory: its modules, shapes and ties, on the meta device."""

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
    """The model of ``config``: parameters on the meta device, what is in no file (rotary frequencies) computed.

    Raises:
        ModelError: transformers, or the code that comes with the model, can make none of it.
    """
    try:
        return _on_meta(partial(AutoModelForCausalLM.from_config, config, trust_remote_code=trust_remote_code), dtype)
    except Exception as error:  # of whatever kind: sizes that do not go together, unknown names, missing packages
        name = config.name_or_path or f"a {config.model_type} configuration"
        raise ModelError(f"no model can be built from {name}: {first_line(error)}") from error


def meta_model_of_class(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class ``kind``, as ``meta_model`` makes it."""
    return _on_meta(partial(kind._from_config, config), dtype)


def _on_meta(build: Callable[..., PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    with no_init_weights(), _parameters_on_meta():
        model = build(dtype=dtype)
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
