"""This rank's part of a parameter."""

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

Partitioned = Any  # a Parameter to which DeepSpeed has given its ds_ attributes
SCALES = ".int8_scales"  # behind the name of a parameter in eight bits


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: the rank-th piece of the flattened whole, as ``torch.chunk`` cuts it."""

    name: str
    # 1-D view of the partition, or int8 codes, without padding; empty on ranks behind a tensor's end; meta if in a file
    data: Tensor
    start: int  # where it begins in the flattened whole
    shape: torch.Size  # of the whole
    group: ProcessGroup  # the ranks that hold the other parts
    storage: Tensor  # all that this rank keeps of it, 1-D: padding too; of eight-bit weights the buffer they lie in
    slot: SwapSlot | None = None  # where it lies, if that is not in memory

    @classmethod
    def of(cls, name: str, parameter: Partitioned) -> "Shard":
        """The shard of a parameter that ZeRO-3 has partitioned."""
        start = min(parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        valid = min(parameter.ds_numel - start, parameter.ds_tensor.ds_numel)
        place = slot_of(parameter)
        kept = parameter.ds_tensor.data
        if place is not None:
            kept = torch.empty(parameter.ds_tensor.ds_numel, dtype=place.dtype, device="meta")
        data = kept if kept.dtype != torch.int8 else int8.view_blocks(kept, parameter.ds_tensor.ds_numel).codes
        return cls(name, data.narrow(0, 0, valid), start, parameter.ds_shape, parameter.ds_process_group, kept, place)

    @classmethod
    def of_scales(cls, name: str, parameter: Partitioned) -> "Shard":
        """The scales of a parameter's eight-bit weights: of as many blocks on each rank, those of padding included."""
        scales = int8.view_blocks(parameter.ds_tensor.data, parameter.ds_tensor.ds_numel).scales
        group = parameter.ds_process_group
        whole = torch.Size([dist.get_world_size(group) * scales.numel()])
        return cls(name + SCALES, scales, dist.get_rank(group) * scales.numel(), whole, group, scales)

    def values(self, number: int, kept: Tensor | None = None) -> Tensor | int8.Blocks:
        """What an update writes to.

        Args:
            number: another for each shard of a model.
            kept: a copy of it, to be written to instead.
        """
        kept = self.storage if kept is None else kept
        start = self.data.storage_offset() - self.storage.storage_offset()
        data = kept[start : start + self.data.numel()]
        if data.dtype != torch.int8:
            return data
        return int8.Blocks(data, kept[: int8.scale_bytes(data.numel())].view(torch.bfloat16), number)

    @property
    def stop(self) -> int:
        """Where it ends in the flattened whole."""
        return self.start + self.data.numel()

    def read(self) -> Tensor:
        """Its values: ``data`` itself, or a copy in host memory of what lies in the file."""
        return self.data if self.slot is None else self.slot.read(self.data.numel())

    def write(self, values: Tensor) -> None:
        """Give it other values (1-D, of its dtype, not written to any more)."""
        if self.slot is None:
            self.data.copy_(values)
        else:
            self.slot.write(values)

    def copy(self) -> "Shard":
        """Its values as they are now, where the device that computes takes no part: in host memory or another file."""
        if self.slot is None:
            return dataclasses.replace(self, data=self.data.to("cpu", copy=True))
        return dataclasses.replace(self, slot=self.slot.copy())


def shards(model: Module) -> list[Shard]:
    """This rank's shard of every parameter, in the model's order; of eight-bit weights two, codes and scales."""
    return list(_shards(model))


def _shards(model: Module) -> Iterator[Shard]:
    for name, parameter in model.named_parameters():
        shard = Shard.of(name, parameter)
        yield shard
        if shard.data.dtype == torch.int8:
            yield Shard.of_scales(name, parameter)


def stored_tensors(whole: dict[str, Tensor], in_eight_bits: Collection[str], parts: int) -> dict[str, Tensor]:
    """What ranks keep of a model in eight bits, as ``shards`` gives it, put together; on the meta device.

    Args:
        whole: its parameters and buffers, on the meta device, by name.
        in_eight_bits: names of parameters.
        parts: ranks.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name in in_eight_bits:
            blocks = parts * int8.block_count(ceil_div(tensor.numel(), parts))
            kept[name] = tensor.to(torch.int8)
            kept[name + SCALES] = torch.empty(blocks, dtype=torch.bfloat16, device="meta")
        else:
            kept[name] = tensor
    return kept


def quantized_names(model: Module) -> set[str]:
    """The parameters of a model, whole ones, that ``weights: int8`` keeps so."""
    return {name for name, parameter in model.named_parameters() if int8.is_quantizable(parameter.shape)}


def dequantize_parameter(codes: Tensor, scales: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """A whole parameter from what ``parts`` ranks have kept of it in eight bits; 1-D, without padding."""
    whole = torch.empty_like(codes, dtype=dtype)
    shard_numel = ceil_div(codes.numel(), parts)
    for some, theirs, part in zip(
        codes.split(shard_numel), scales.chunk(parts), whole.split(shard_numel), strict=False
    ):
        int8.dequantize(int8.Blocks(some, theirs[: int8.block_count(some.numel())], 0), part)
    return whole


def slot_of(parameter: Partitioned) -> SwapSlot | None:
    """The file that this rank's partition lies in; None if it is in memory."""
    return getattr(parameter.ds_tensor, "swap_slot", None)


def full_shape(parameter: Partitioned) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
