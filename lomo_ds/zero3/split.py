"""Partitioning of full parameters into shards, and the restoration of full parameters on a single rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init, ZeroParamStatus
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import check_host_memory, free_bytes
from lomo_ds.memory.host_memory import PinnedMemory
from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.nvme_partitions import move_to_memory, move_to_nvme, swap_space
from lomo_ds.zero3.shard import Partitioned, Shard


def partition(
    model: Module, ds_config: dict[str, Any], dtype: torch.dtype, free_host_bytes: int | None = None
) -> Iterator[Shard]:
    """Allocate the shards of a model on the meta device, without a collective.

    Yields each parameter's shard, which the caller must fill before it requests the next. Besides the shards, one full
    parameter at a time is allocated, but not touched.

    Args:
        free_host_bytes: free host memory per rank, measured before any rank allocates; measured here by default.

    Raises:
        ConfigError: host memory or the drive is too small.
    """
    device = _device()
    pinned = _pinned_memory(list(model.parameters()), ds_config, dtype, free_host_bytes)
    converter = _converter([], ds_config, dtype)
    space = swap_space(ds_config, dtype, device) if offload_device(ds_config) == "nvme" else None
    for name, parameter in model.named_parameters():
        # DeepSpeed cannot partition meta tensors
        torch.utils.swap_tensors(
            parameter, Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), parameter.requires_grad)
        )
        converter._convert_to_deepspeed_param(parameter)
        partitioned: Partitioned = parameter
        partitioned.partition()
        if pinned is not None and not _in_eight_bits(ds_config, partitioned):
            partitioned.ds_tensor.data = pinned.empty_like(partitioned.ds_tensor)
        _clear_padding(partitioned)
        yield Shard.of(name, partitioned)
        if _in_eight_bits(ds_config, partitioned):
            _store(partitioned, _eight_bits_of(partitioned), ds_config, pinned)
        if space is not None:
            move_to_nvme(partitioned, space)


def split(model: Module, ds_config: dict[str, Any], dtype: torch.dtype, free_host_bytes: int | None = None) -> None:
    """Partition the parameters that are not partitioned yet, and store all shards as ``ds_config`` says.

    Args:
        free_host_bytes: see ``partition``.

    Raises:
        ConfigError: host memory or the drive is too small.
    """
    parameters: list[Partitioned] = list(model.parameters())
    unpartitioned = [parameter for parameter in parameters if not hasattr(parameter, "ds_tensor")]
    for parameter in parameters:
        _check_int8_is_configured(ds_config, parameter)
    pinned = _pinned_memory(unpartitioned, ds_config, dtype, free_host_bytes)
    _convert(unpartitioned, ds_config, dtype)
    for parameter in unpartitioned:
        _clear_padding(parameter)
    if offload_device(ds_config) == "nvme":
        space = swap_space(ds_config, dtype, _device(), parameters)
        for parameter in parameters:
            move_to_nvme(parameter, space)
        return
    move_to_memory(parameters)
    new = set(map(id, unpartitioned))
    for parameter in parameters:
        if _in_eight_bits(ds_config, parameter) and parameter.ds_tensor.dtype != torch.int8:
            _store(parameter, _eight_bits_of(parameter), ds_config, pinned)
        elif id(parameter) in new or parameter.ds_tensor.device.type != _storage_device(ds_config).type:
            _store(parameter, parameter.ds_tensor.data, ds_config, pinned)


def offload_device(ds_config: dict[str, Any]) -> str:
    """Return where shards are stored: ``none`` (on the compute device), ``cpu`` or ``nvme``."""
    offload = ds_config["zero_optimization"].get("offload_param") or {}
    return str(offload.get("device", "none"))


def is_resident_config(ds_config: dict[str, Any]) -> bool:
    """Return whether nothing will be gathered: one rank, no offload, no eight-bit weights."""
    return dist.get_world_size() == 1 and offload_device(ds_config) == "none" and not uses_int8_weights(ds_config)


def uses_int8_weights(ds_config: dict[str, Any]) -> bool:
    """Return whether matrices are stored as eight-bit weights."""
    optimizer = ds_config.get("optimizer") or {}
    return (optimizer.get("params") or {}).get("weights") == "int8"


def is_resident(model: Module) -> bool:
    """Return whether all shards are full parameters on the compute device: one rank, nothing offloaded."""
    partitioned: list[Partitioned] = list(model.parameters())
    return dist.get_world_size() == 1 and all(parameter.ds_tensor.device == _device() for parameter in partitioned)


def restore_full_params(parameters: list[Partitioned]) -> None:
    """Make every parameter a view of its shard again, on a single rank; DeepSpeed's own gathering could copy it."""
    for parameter in parameters:
        if parameter.ds_status is not ZeroParamStatus.AVAILABLE:
            parameter.data = parameter.ds_tensor.data.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE


@contextmanager
def gathered(parameters: list[Parameter]) -> Iterator[None]:
    """Gather the full ``parameters`` on every rank, for reading."""
    with GatheredParameters(parameters):
        yield


def _pinned_memory(
    parameters: list[Parameter], ds_config: dict[str, Any], dtype: torch.dtype, free_host_bytes: int | None
) -> PinnedMemory | None:
    """Return pinned memory for offloaded shards, in slabs, since DeepSpeed pins each one separately; None if unpinned.

    Raises:
        ConfigError: host memory is too small; nothing has been allocated yet.
    """
    if offload_device(ds_config) != "cpu":
        return None
    numels = [ceil_div(parameter.numel(), dist.get_world_size()) for parameter in parameters]
    if uses_int8_weights(ds_config):
        need = sum(map(int8.quantized_bytes, numels))
        remedy = "use offload_param.device nvme without weights int8, or a host with more memory"
    else:
        need = sum(numels) * dtype.itemsize
        remedy = "weights int8 need about half of it, offload_param.device nvme next to nothing"
    free = free_bytes()[1] if free_host_bytes is None else free_host_bytes
    check_host_memory(need, free, "offload_param.device cpu", remedy)
    pinned = ds_config["zero_optimization"]["offload_param"].get("pin_memory", True)
    return PinnedMemory(_device(), need) if pinned else None


def _in_eight_bits(ds_config: dict[str, Any], parameter: Partitioned) -> bool:
    return uses_int8_weights(ds_config) and int8.is_quantizable(parameter.ds_shape)


def _check_int8_is_configured(ds_config: dict[str, Any], parameter: Partitioned) -> None:
    split_before = hasattr(parameter, "ds_tensor")
    if split_before and parameter.ds_tensor.dtype == torch.int8 and not _in_eight_bits(ds_config, parameter):
        raise ConfigError(
            "the model's weights are already stored in eight bits, but the DeepSpeed config does not say so; set "
            "optimizer.params.weights to int8, or load the model again"
        )


def _clear_padding(parameter: Partitioned) -> None:
    """Zero the padding, which DeepSpeed leaves uninitialized, since it is quantized along with the last weights."""
    shard = Shard.of("", parameter)
    shard.storage[shard.data.numel() :].zero_()


def _eight_bits_of(parameter: Partitioned) -> Tensor:
    return int8.quantize_flat(parameter.ds_tensor.data.to(_device()))


def _store(parameter: Partitioned, values: Tensor, ds_config: dict[str, Any], pinned: PinnedMemory | None) -> None:
    """Make ``values`` this rank's partition, on the device that the config chooses."""
    stored = values.to(_storage_device(ds_config)) if pinned is None else pinned.empty_like(values).copy_(values)
    parameter.ds_tensor.data = stored


def _storage_device(ds_config: dict[str, Any]) -> torch.device:
    """Return the device of shards that are stored in memory."""
    return torch.device("cpu") if offload_device(ds_config) == "cpu" else _device()


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _convert(parameters: list[Partitioned], ds_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Partition full parameters, with the values of rank 0; a single rank has nothing to broadcast."""
    if parameters and dist.get_world_size() > 1:
        _converter(parameters, ds_config, dtype)
    elif parameters:
        converter = _converter([], ds_config, dtype)
        for parameter in parameters:
            parameter.data = parameter.data.to(converter.local_device)
            converter._convert_to_deepspeed_param(parameter)
            parameter.partition()


def _converter(parameters: list[Parameter], ds_config: dict[str, Any], dtype: torch.dtype) -> Init:
    """Return DeepSpeed's converter, which has partitioned ``parameters``.

    It replaces ``torch.nn.functional.linear`` in the whole process by one that does not save weights that are freed
    after forward, but with several times the Python overhead; this is disabled if weights are never freed.
    """
    zero = dict(ds_config["zero_optimization"])
    zero.pop("zero_quantized_weights", None)  # otherwise it would load its own kernels
    if is_resident_config(ds_config):
        zero["memory_efficient_linear"] = False
    if offload_device(ds_config) != "none":  # partitions go to NVMe through host memory
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return Init(
        module=torch.nn.ParameterList(parameters),
        config_dict_or_path=ds_config | {"zero_optimization": zero},
        dtype=dtype,
    )
