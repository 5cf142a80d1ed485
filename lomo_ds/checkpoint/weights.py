"""Weights of a checkpoint: each rank writes its own shards, and any number of ranks can read them.

This uses ``torch.distributed.checkpoint`` with safetensors files. A shard is saved as a 1-D DTensor over the flattened
parameter, which records the shard's position in it. No file is a pickle.
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
from lomo_ds.checkpoint.planners import ShardLoadPlanner, ShardSavePlanner
from lomo_ds.errors import CheckpointError, DamagedError
from lomo_ds.numerics.flat import ceil_div

FILE_BYTES = 2**28  # largest file of one rank's shards; a file is assembled in memory before it is written


def save_weights(shards: list[zero3.Shard], buffers: dict[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Write the ``shards`` of every rank and the ``buffers`` of one rank to ``folder``. All ranks must call this.

    Raises:
        CheckpointError: a rank cannot write; raised on every rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(shards, buffers), save_distributed=True)
    tensors = _as_dtensors(shards, group) | buffers
    try:
        checkpoint.save(tensors, storage_writer=writer, planner=ShardSavePlanner(shards), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder.parent} cannot be written: {_first_failure(error)}") from None


def load_weights(shards: list[zero3.Shard], buffers: dict[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Fill ``shards`` and ``buffers`` from a checkpoint of any world size. All ranks must call this.

    Raises:
        DamagedError: the files do not hold them; raised on every rank.
    """
    tensors = _as_dtensors(shards, group) | buffers
    try:
        reader = HuggingFaceStorageReader(str(folder))
        checkpoint.load(tensors, storage_reader=reader, planner=ShardLoadPlanner(shards), process_group=group)
    except CheckpointException as error:
        raise DamagedError(f"{folder} cannot be read: {_first_failure(error)}") from None


def load_full_tensors(
    like: dict[str, Tensor], folder: Path, in_eight_bits: Collection[str] = (), parts: int = 1
) -> dict[str, Tensor]:
    """Load full tensors in a single process, without a process group.

    Args:
        like: tensors on the meta device with the shapes and dtypes to load, keyed by name.
        in_eight_bits: names of the tensors that were saved as int8; they are returned as floats.
        parts: the number of ranks that saved the checkpoint.

    Raises:
        DamagedError: the files do not hold the tensors.
    """
    stored = zero3.stored_tensors(like, in_eight_bits, parts)
    flat = {name: torch.empty(tensor.numel(), dtype=tensor.dtype) for name, tensor in stored.items()}
    try:
        with warnings.catch_warnings(action="ignore"):  # no_dist=True warns that torch.distributed is not used
            checkpoint.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise DamagedError(f"{folder} cannot be read: {_first_failure(error)}") from None
    for name, tensor in like.items():
        if name in in_eight_bits:
            flat[name] = zero3.dequantize_parameter(flat[name], flat[name + zero3.SCALES], parts, tensor.dtype)
    return {name: flat[name].view(tensor.shape) for name, tensor in like.items()}


def weight_files_of_rank(folder: Path, rank: int) -> list[Path]:
    """Return the files that ``save_weights`` wrote on one rank."""
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
    """Assign each tensor to a file number, counted from 1 and equal on every rank."""
    file_of: dict[str, int] = dict.fromkeys(buffers, 1)
    file, filled = 1, 0
    for shard in shards:
        nbytes = ceil_div(shard.shape.numel(), torch.distributed.get_world_size(shard.group)) * shard.data.itemsize
        if filled and filled + nbytes > FILE_BYTES:
            file, filled = file + 1, 0
        file_of[shard.name] = file
        filled += nbytes
    return file_of


def _first_failure(error: CheckpointException) -> str:
    rank = min(error.failures)
    failure = error.failures[rank][0]
    return f"{getattr(failure, 'strerror', None) or failure} (rank {rank})"
