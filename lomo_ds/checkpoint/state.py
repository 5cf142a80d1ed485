"""What one checkpoint holds beside the weights, and how it is laid out on disk."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lomo_ds.checkpoint.folders import RECORD, WEIGHTS
from lomo_ds.errors import CheckpointError, DamagedError
from lomo_ds.numerics.int8 import BLOCK
from lomo_ds.zero3 import SCALES, Shard

MODEL = "model"  # folder of configuration and tokenizer, in a checkpoint of launch/train.py
FORMAT = 1


@dataclass
class Snapshot:
    """One rank's view of a step that is to be saved.

    Attributes:
        shards: of every parameter, in the model's order.
        buffers: that belong to the weights, the same on every rank.
        of_rank: what only this rank has: states of generators, of the update rule.
        record: what is the same on every rank, as JSON: counters, loss scale, learning rates, and what the caller adds.
    """

    shards: list[Shard]
    buffers: dict[str, Tensor]
    of_rank: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def tensors(self) -> dict[str, list[Any]]:
        """See ``tensor_record``."""
        whole = {s.name: torch.empty(s.shape, dtype=s.data.dtype, device="meta") for s in self.shards}
        return tensor_record(whole | self.buffers)


def rank_file(folder: Path, rank: int) -> Path:
    """Where ``of_rank`` of a rank is kept."""
    return folder / f"rank-{rank:05d}.safetensors"


def tensor_record(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and dtype of every whole tensor (on the meta device, say), by name, as JSON."""
    return {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}


def read_record(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """The record of a checkpoint that holds ``files``.

    Raises:
        DamagedError: it is unreadable, or the files are not those of its number of ranks.
        CheckpointError: another version of lomo_ds wrote it.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, world_size = record["format"], record["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder / RECORD} is damaged: {error}") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {version}, and this lomo_ds reads format {FORMAT}; resume with the "
            "version that wrote it"
        )
    ranks = [name for name in files if name.startswith("rank-")]
    if len(ranks) != world_size:
        raise DamagedError(f"{folder} is not whole: it is of {world_size} ranks, and holds the files of {len(ranks)}")
    return record


def refuse_strangers(folder: Path, files: Iterable[str]) -> None:
    """Check that the folder of the weights holds nothing but ``files``: all in it would be taken for weights.

    Raises:
        DamagedError: there is another one; it is named.
    """
    for file in (folder / WEIGHTS).iterdir():
        if file.relative_to(folder).as_posix() not in files:
            raise DamagedError(f"{file} is not of this checkpoint, whose manifest does not name it; remove it")


def read_rank(folder: Path, rank: int) -> dict[str, Tensor]:
    """``of_rank`` of one rank."""
    try:
        return load_file(rank_file(folder, rank))
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{rank_file(folder, rank)} cannot be read: {error}") from None


def refuse_other_model(folder: Path, record: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    """Check that a checkpoint is of the model at hand.

    Raises:
        CheckpointError: a tensor of it is missing, unknown, or of another shape or dtype; the first is named.
    """
    theirs = record["tensors"]
    for name in sorted(theirs.keys() | tensors.keys()):
        if theirs.get(name) != tensors.get(name):
            have, want = (_describe(found.get(name)) for found in (theirs, tensors))
            raise CheckpointError(
                f"{folder} is of another model: its {name} is {have}, and this model's is {want}; resume with the "
                "model and precision it was saved with, or give another --output_dir"
            )


def refuse_other_blocks(folder: Path, record: dict[str, Any], world_size: int) -> None:
    """Check that the blocks of weights in eight bits, which begin anew on each rank, are the same on ``world_size``.

    Raises:
        CheckpointError: they are not; the first parameter is named.
    """
    ranks = {record["world_size"], world_size}
    for name, (shape, _) in record["tensors"].items():
        if (
            name + SCALES in record["tensors"]
            and len(ranks) > 1
            and any(math.prod(shape) % (count * BLOCK) for count in ranks)
        ):
            raise CheckpointError(
                f"{folder} holds weights in eight bits as {record['world_size']} ranks cut them into blocks, and those "
                f"of {name} begin elsewhere on {world_size}; resume on {record['world_size']}"
            )


def dtype_of(name: str) -> torch.dtype:
    """The dtype that ``tensor_record`` has written down."""
    return getattr(torch, name)


def _describe(tensor: list[Any] | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor[0])} {tensor[1]}"
