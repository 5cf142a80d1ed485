"""The contents of a checkpoint other than the weights, their layout on disk, and compatibility checks."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lomo_ds.checkpoint.folders import RECORD, WEIGHTS
from lomo_ds.errors import CheckpointError, DamagedError
from lomo_ds.numerics.int8 import BLOCK
from lomo_ds.zero3 import SCALES, Shard

MODEL = "model"  # folder of configuration and tokenizer in checkpoints that launch/train.py writes
FORMAT = 2
WITHOUT_STATE = "load with load_optimizer_states=False, which leaves the state unchanged"


@dataclass
class Snapshot:
    """One rank's state after a step, to be saved or filled.

    Attributes:
        shards: this rank's shard of every parameter, in the model's order.
        buffers: the model's persistent buffers, which are equal on every rank.
        state_shards: this rank's slices of the update rules' state.
        replicated_state: the update rules' state that is equal on every rank.
        rank_state: state of this rank only: random number generators.
        record: JSON state that is equal on every rank: counters, loss scale, learning rates, the caller's additions.
    """

    shards: list[Shard]
    buffers: dict[str, Tensor]
    state_shards: list[Shard]
    replicated_state: dict[str, Tensor]
    rank_state: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def tensors(self) -> dict[str, list[Any]]:
        """Shapes and dtypes of all parameters and buffers, see ``describe_tensors``."""
        return describe_tensors(_full_tensors(self.shards) | self.buffers)

    @property
    def rule_state(self) -> dict[str, list[Any]]:
        """Shapes and dtypes of all state of the update rules, see ``describe_tensors``."""
        return describe_tensors(_full_tensors(self.state_shards) | self.replicated_state)


def _full_tensors(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """Return the full tensors of shards, on the meta device."""
    return {shard.name: torch.empty(shard.shape, dtype=shard.data.dtype, device="meta") for shard in shards}


def rank_state_file(folder: Path, rank: int) -> Path:
    """Return the path of the file that holds the ``rank_state`` of ``rank``."""
    return folder / f"rank-{rank:05d}.safetensors"


def describe_tensors(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Return the shape and dtype of every full tensor (which may be on the meta device), keyed by name, as JSON."""
    return {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}


def read_record(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """Read the record of a checkpoint that holds ``files``.

    Raises:
        DamagedError: the record is unreadable, or the files do not match its world size.
        CheckpointError: another version of lomo_ds wrote the checkpoint.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, world_size = record["format"], record["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder / RECORD} is damaged: {error}") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {version}, but this lomo_ds reads format {FORMAT}; resume with the "
            "version that wrote it"
        )
    ranks = [name for name in files if name.startswith("rank-")]
    if len(ranks) != world_size:
        raise DamagedError(f"{folder} is not whole: {world_size} ranks saved it, but it holds files of {len(ranks)}")
    return record


def check_no_extra_files(folder: Path, files: Iterable[str]) -> None:
    """Check that the weights folder holds only ``files``, because loading reads every file in it.

    Raises:
        DamagedError: there is another file; the message names it.
    """
    for file in (folder / WEIGHTS).iterdir():
        if file.relative_to(folder).as_posix() not in files:
            raise DamagedError(f"{file} is not part of this checkpoint: its manifest does not name it; remove the file")


def load_rank_state(folder: Path, rank: int) -> dict[str, Tensor]:
    """Load the ``rank_state`` of one rank."""
    try:
        return load_file(rank_state_file(folder, rank))
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{rank_state_file(folder, rank)} cannot be read: {error}") from None


def check_same_model(folder: Path, record: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    """Check that a checkpoint has the tensors of the current model.

    Args:
        tensors: shapes and dtypes of the current model, see ``describe_tensors``.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape or dtype; the message names the first.
    """
    for name, saved, current in _differences(record["tensors"], tensors):
        raise CheckpointError(
            f"{folder} is of another model: its {name} is {saved}, but this model's is {current}; resume with the "
            "model and precision it was saved with, or give another --output_dir"
        )


def check_same_rule_state(folder: Path, record: dict[str, Any], rule_state: dict[str, list[Any]]) -> None:
    """Check that a checkpoint has the state of the current update rules.

    Args:
        rule_state: see ``Snapshot.rule_state``.

    Raises:
        CheckpointError: a state is missing, unknown, or has another shape or dtype; the message names the first.
    """
    for name, saved, current in _differences(record["rule_state"], rule_state):
        raise CheckpointError(
            f"{folder} was saved with another optimizer: the state {name} is {saved} in it, but {current} in this run; "
            f"resume with the optimizer it was saved with, or {WITHOUT_STATE}"
        )


def check_same_blocks(
    folder: Path, record: dict[str, Any], world_size: int, kind: Literal["tensors", "rule_state"] = "tensors"
) -> None:
    """Check that the blocks of int8 tensors are the same on ``world_size`` ranks; each rank's shard starts a new block.

    Args:
        kind: the tensors to check: weights and buffers, or the state of the update rules.

    Raises:
        CheckpointError: the blocks differ; the message names the first parameter.
    """
    ranks = {record["world_size"], world_size}
    tensors = record[kind]
    for name, (shape, _) in tensors.items():
        if name + SCALES in tensors and len(ranks) > 1 and any(math.prod(shape) % (count * BLOCK) for count in ranks):
            raise CheckpointError(
                f"{folder} holds int8 tensors in the blocks of {record['world_size']} ranks, but the blocks of {name} "
                f"differ on {world_size} ranks; resume on {record['world_size']}"
                + (f", or {WITHOUT_STATE}" if kind == "rule_state" else "")
            )


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype for a name that ``describe_tensors`` wrote."""
    return getattr(torch, name)


def _differences(saved: dict[str, list[Any]], current: dict[str, list[Any]]) -> Iterator[tuple[str, str, str]]:
    """Iterate over the names of tensors that differ, by name, each with the saved and the current tensor in words."""
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            yield name, _describe(saved.get(name)), _describe(current.get(name))


def _describe(tensor: list[Any] | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor[0])} {tensor[1]}"
