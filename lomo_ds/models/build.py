"""A causal language model without memory: its modules, shapes and ties, on the meta device."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def meta_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of ``config``: parameters on the meta device, what is in no file (rotary frequencies) computed."""
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # some models declare one in float32, whatever they are asked for
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
    return model


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that a meta model's files hold, on the meta device, by name; tied ones once."""
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that a model's files hold, by name."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if name not in computed}
