"""Weights of a checkpoint: each rank writes its own shards, any number of ranks reads them.

``torch.distributed.checkpoint`` over safetensors: a shard is a 1-D DTensor over the flattened parameter, which knows
where it lies in the whole. No file of it is a pickle.
"""

import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lomo_ds import zero3
from lomo_ds.checkpoint.planners import FromShards, IntoShards
from lomo_ds.errors import CheckpointError, DamagedError

FILE_BYTES = 2**28  # of one rank's shards in one file, which is put together in memory before it is written


def save_weights(shards: list[zero3.Shard], buffers: dict[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Write every rank's ``shards``, and one rank's ``buffers``, into ``folder``; all ranks call it.

    Raises:
        CheckpointError: some rank cannot write; on every rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(shards, buffers), save_distributed=True)
    tensors = _as_dtensors(shards, group) | buffers
    try:
        checkpoint.save(tensors, storage_writer=writer, planner=FromShards(shards), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder.parent} cannot be written: {_first_failure(error)}") from None


def load_weights(shards: list[zero3.Shard], buffers: dict[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Fill every rank's ``shards``, and ``buffers``, from what any number of ranks has written; all ranks call it.

    Raises:
        DamagedError: the files do not hold them; on every rank.
    """
    tensors = _as_dtensors(shards, group) | buffers
    try:
        reader = HuggingFaceStorageReader(str(folder))
        checkpoint.load(tensors, storage_reader=reader, planner=IntoShards(shards), process_group=group)
    except CheckpointException as error:
        raise DamagedError(f"{folder} cannot be read: {_first_failure(error)}") from None


def whole_tensors(
    like: dict[str, Tensor], folder: Path, in_eight_bits: Collection[str] = (), parts: int = 1
) -> dict[str, Tensor]:
    """Whole tensors, in one process, without the ranks that wrote them.

    Args:
        like: the shape and dtype of each, on the meta device.
        in_eight_bits: names of those that were written so; they come back as floats.
        parts: how many ranks have written.

    Raises:
        DamagedError: the files do not hold them.
    """
    kept = zero3.kept_tensors(like, in_eight_bits, parts)
    flat = {name: torch.empty(tensor.numel(), dtype=tensor.dtype) for name, tensor in kept.items()}
    try:
        with warnings.catch_warnings(action="ignore"):  # that torch.distributed is off, which is what no_dist asks for
            checkpoint.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise DamagedError(f"{folder} cannot be read: {_first_failure(error)}") from None
    for name, tensor in like.items():
        if name in in_eight_bits:
            flat[name] = zero3.as_floats(flat[name], flat[name + zero3.SCALES], parts, tensor.dtype)
    return {name: flat[name].view(tensor.shape) for name, tensor in like.items()}


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """The files that ``save_weights`` has written on one rank."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def _as_dtensors(shards: list[zero3.Shard], group: ProcessGroup) -> dict[str, Tensor]:
    meshes: dict[str, DeviceMesh] = {}
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        device = "cpu" if shard.data.is_meta else shard.data.device.type
        if device not in meshes:
            meshes[device] = DeviceMesh.from_group(group, device)
        tensors[shard.name] = DTensor.from_local(
            shard.data,
            meshes[device],
            [Shard(0)],
            run_check=False,
            shape=torch.Size([shard.shape.numel()]),
            stride=(1,),
        )
    return tensors


def _files(shards: list[zero3.Shard], buffers: dict[str, Tensor]) -> dict[str, int]:
    """Which file a tensor goes into, counted from 1, the same on every rank."""
    file_of: dict[str, int] = dict.fromkeys(buffers, 1)
    file, filled = 1, 0
    for shard in shards:
        nbytes = -(-shard.shape.numel() // torch.distributed.get_world_size(shard.group)) * shard.data.itemsize
        if filled and filled + nbytes > FILE_BYTES:
            file, filled = file + 1, 0
        file_of[shard.name] = file
        filled += nbytes
    return file_of


def _first_failure(error: CheckpointException) -> str:
    rank = min(error.failures)
    failure = error.failures[rank][0]
    return f"{getattr(failure, 'strerror', None) or failure} (rank {rank})"
