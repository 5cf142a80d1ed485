"""Support for ``deepspeed.utils.safe_get_*`` and ``safe_set_*``: weights as fp32, for every store and data type.

DeepSpeed calls these methods by name on ``parameter._z3_optimizer``. Every rank must call them.
"""

from collections.abc import Callable
from typing import Any, Never

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.errors import ConfigError
from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.shard import Shard

ATTRIBUTE = "_z3_optimizer"


class ParameterAccess:
    """Access to the partitioned parameters of a model; the next forward uses the values that were written.

    Only weights are available: the state of update rules is kept elsewhere, and gradients do not outlive backward.
    """

    def __init__(self, model: Module) -> None:
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            setattr(parameter, ATTRIBUTE, self)

    def remove(self) -> None:
        """Remove this object from the parameters."""
        for parameter in self.parameters:
            if getattr(parameter, ATTRIBUTE, None) is self:
                delattr(parameter, ATTRIBUTE)

    def get_full_hp_param(self, param: Parameter, optim_state_key: str | None = None) -> Tensor:
        """Return the full parameter in fp32, on every rank."""
        _check_no_state(optim_state_key)
        shard = Shard.of("", param)
        part = _values_of(shard)
        world_size = dist.get_world_size(shard.group)
        whole = part
        if world_size > 1:
            whole = part.new_empty(world_size * part.numel())
            dist.all_gather_into_tensor(whole, part, group=shard.group)
        return whole[: shard.shape.numel()].view(shard.shape)

    def set_full_hp_param(self, value: Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Set the full parameter; every rank passes all values."""
        _check_no_state(optim_state_key)
        shard = Shard.of("", param)
        _check_value(value, shard.shape.numel())
        self._write(param, shard, value.detach().reshape(-1)[shard.start : shard.stop])

    def get_local_fp32_param(self, param: Parameter, optim_state_key: str | None = None) -> Tensor:
        """Return this rank's partition in fp32: 1-D, equally long on all ranks, padded with zeros."""
        _check_no_state(optim_state_key)
        return _values_of(Shard.of("", param))

    def set_local_hp_param(self, value: Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Set this rank's partition, with the padding of ``get_local_fp32_param``."""
        _check_no_state(optim_state_key)
        shard = Shard.of("", param)
        _check_value(value, _padded_numel(shard))
        self._write(param, shard, value.detach().reshape(-1)[: shard.data.numel()])

    def get_fp32_grad_for_param(self, param: Parameter) -> Never:
        """Raise ConfigError: gradients are not kept."""
        _raise_no_gradient()

    def set_fp32_grad_for_param(self, value: Tensor, param: Parameter) -> Never:
        """Raise ConfigError: gradients are not kept."""
        _raise_no_gradient()

    def get_local_fp32_grad_for_param(self, param: Parameter) -> Never:
        """Raise ConfigError: gradients are not kept."""
        _raise_no_gradient()

    def set_local_grad_for_param(self, value: Tensor, param: Parameter) -> Never:
        """Raise ConfigError: gradients are not kept."""
        _raise_no_gradient()

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[..., Any], param_list: list[Parameter]
    ) -> Never:
        """Raise ConfigError: gradients are not kept."""
        _raise_no_gradient()

    @torch.no_grad()
    def _write(self, param: Parameter, shard: Shard, values: Tensor) -> None:
        values = values.to(get_accelerator().current_device_name(), torch.float32)
        if shard.data.dtype == torch.int8:
            padded = values.new_zeros(_padded_numel(shard))
            padded[: values.numel()] = values
            shard.storage.copy_(int8.quantize_flat(padded))
        elif values.numel():
            shard.write(values.to(shard.data.dtype))
        get_accelerator().synchronize()  # DeepSpeed gathers on a stream that does not wait for this one
        if param.shape == shard.shape:  # the gathered copy would be used without another gather
            param.copy_(self.get_full_hp_param(param))


@torch.no_grad()
def _values_of(shard: Shard) -> Tensor:
    """Return a copy of a shard's values in fp32 on the compute device, padded with zeros."""
    part = torch.zeros(_padded_numel(shard), device=get_accelerator().current_device_name())
    if shard.data.dtype == torch.int8:
        floats = torch.empty(part.numel(), device=shard.storage.device)
        int8.dequantize(int8.view_blocks(shard.storage, part.numel()), floats)
        part[: shard.data.numel()] = floats[: shard.data.numel()]
    elif shard.data.numel():
        part[: shard.data.numel()] = shard.read()
    return part


def _padded_numel(shard: Shard) -> int:
    return ceil_div(shard.shape.numel(), dist.get_world_size(shard.group))


def _check_value(value: Any, numel: int) -> None:
    if not isinstance(value, Tensor) or value.is_complex():
        raise ConfigError(f"a parameter's new value must be a tensor of real numbers, got a {type(value).__name__}")
    if value.numel() != numel:
        raise ConfigError(f"a parameter's new value must have {numel} elements, got shape {list(value.shape)}")


def _check_no_state(key: str | None) -> None:
    if key is not None:
        raise ConfigError(f"the optimizer state {key!r} cannot be read or set, only weights can")


def _raise_no_gradient() -> Never:
    raise ConfigError(
        "no gradient is kept after backward; use parameter.register_hook(function) to see or replace this rank's "
        "gradient during backward, or engine.get_global_grad_norm() for the gradient norm"
    )
