"""Shards: this rank's parts of the parameters."""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.nvme import SwapSlot

Partitioned = Any  # a Parameter with the ds_* attributes of DeepSpeed
SCALES = ".int8_scales"  # suffix of the name of an eight-bit parameter


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: chunk number ``rank`` of the flattened parameter, as in ``torch.chunk``."""

    name: str
    # 1-D view of the partition, or its int8 codes, without padding; may be empty; on the meta device if on NVMe
    data: Tensor
    start: int  # offset in the flattened parameter
    shape: torch.Size  # of the full parameter
    group: ProcessGroup  # the ranks that hold the other parts
    storage: Tensor  # 1-D, with padding; for eight-bit weights, the buffer of codes and scales
    slot: SwapSlot | None = None  # location on NVMe; None if in memory

    @classmethod
    def of(cls, name: str, parameter: Partitioned) -> "Shard":
        """Return the shard of a partitioned parameter."""
        start = min(parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        valid = min(parameter.ds_numel - start, parameter.ds_tensor.ds_numel)
        slot = slot_of(parameter)
        storage = parameter.ds_tensor.data
        if slot is not None:
            storage = torch.empty(parameter.ds_tensor.ds_numel, dtype=slot.dtype, device="meta")
        data = storage if storage.dtype != torch.int8 else int8.view_blocks(storage, parameter.ds_tensor.ds_numel).codes
        return cls(name, data.narrow(0, 0, valid), start, parameter.ds_shape, parameter.ds_process_group, storage, slot)

    @classmethod
    def of_scales(cls, name: str, parameter: Partitioned) -> "Shard":
        """Return the shard of a parameter's eight-bit scales; every rank has equally many, also for padding."""
        scales = int8.view_blocks(parameter.ds_tensor.data, parameter.ds_tensor.ds_numel).scales
        group = parameter.ds_process_group
        shape = torch.Size([dist.get_world_size(group) * scales.numel()])
        return cls(name + SCALES, scales, dist.get_rank(group) * scales.numel(), shape, group, scales)

    def values(self, number: int, storage: Tensor | None = None) -> Tensor | int8.Blocks:
        """Return the values that an update changes in place.

        Args:
            number: unique number of the shard within the model.
            storage: a copy of ``self.storage`` to be changed instead.
        """
        storage = self.storage if storage is None else storage
        start = self.data.storage_offset() - self.storage.storage_offset()
        data = storage[start : start + self.data.numel()]
        if data.dtype != torch.int8:
            return data
        return int8.Blocks(data, storage[: int8.scale_bytes(data.numel())].view(torch.bfloat16), number)

    @property
    def stop(self) -> int:
        """End offset in the flattened parameter."""
        return self.start + self.data.numel()

    def read(self) -> Tensor:
        """Return the values: ``data`` itself, or a copy in host memory if the shard is on NVMe."""
        return self.data if self.slot is None else self.slot.read(self.data.numel())

    def write(self, values: Tensor) -> None:
        """Set the values; the caller must not change ``values`` (1-D, same dtype) afterwards."""
        if self.slot is None:
            self.data.copy_(values)
        else:
            self.slot.write(values)

    def copy(self) -> "Shard":
        """Return a snapshot that uses no device memory: in host memory, or in another slot on NVMe."""
        if self.slot is None:
            return dataclasses.replace(self, data=self.data.to("cpu", copy=True))
        return dataclasses.replace(self, slot=self.slot.copy())


def shards(model: Module) -> list[Shard]:
    """Return this rank's shards in model order; for eight-bit weights two each, codes and scales."""
    return list(_shards(model))


def _shards(model: Module) -> Iterator[Shard]:
    for name, parameter in model.named_parameters():
        shard = Shard.of(name, parameter)
        yield shard
        if shard.data.dtype == torch.int8:
            yield Shard.of_scales(name, parameter)


def stored_tensors(full: dict[str, Tensor], in_eight_bits: Collection[str], parts: int) -> dict[str, Tensor]:
    """Return meta tensors of all shards of a model, concatenated over the ranks, as ``shards`` names them.

    Args:
        full: the model's parameters and buffers, on the meta device, by name.
        in_eight_bits: names of the parameters in eight bits.
        parts: number of ranks.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in full.items():
        if name in in_eight_bits:
            blocks = parts * int8.block_count(ceil_div(tensor.numel(), parts))
            stored[name] = tensor.to(torch.int8)
            stored[name + SCALES] = torch.empty(blocks, dtype=torch.bfloat16, device="meta")
        else:
            stored[name] = tensor
    return stored


def quantized_names(model: Module) -> set[str]:
    """Return the names of the parameters that ``weights: int8`` stores in eight bits; none may be partitioned."""
    return {name for name, parameter in model.named_parameters() if int8.is_quantizable(parameter.shape)}


def dequantize_parameter(codes: Tensor, scales: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Dequantize a full parameter from the shards of ``parts`` ranks; 1-D, without padding."""
    values = torch.empty_like(codes, dtype=dtype)
    shard_numel = ceil_div(codes.numel(), parts)
    for shard_codes, shard_scales, part in zip(
        codes.split(shard_numel), scales.chunk(parts), values.split(shard_numel), strict=False
    ):
        int8.dequantize(int8.Blocks(shard_codes, shard_scales[: int8.block_count(shard_codes.numel())], 0), part)
    return values


def slot_of(parameter: Partitioned) -> SwapSlot | None:
    """Return the NVMe slot of this rank's partition; None if it is in memory."""
    return getattr(parameter.ds_tensor, "swap_slot", None)


def full_shape(parameter: Partitioned) -> torch.Size:
    """Return the shape of the full parameter, whether it is partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
