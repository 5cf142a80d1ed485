"""A checkpoint read by all ranks: verified first, then each rank takes its part of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.checkpoint.folders import WEIGHTS, newest_first
from lomo_ds.checkpoint.manifest import Entry, read_manifest, share, verify, warn_of_edits
from lomo_ds.checkpoint.state import (
    MODEL,
    Snapshot,
    read_rank,
    read_record,
    refuse_other_blocks,
    refuse_other_model,
    refuse_strangers,
)
from lomo_ds.checkpoint.weights import load_weights
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.errors import CheckpointError, LomoError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte is what was written, but for settings that people edit."""

    folder: Path
    record: dict[str, Any]

    @property
    def weights(self) -> Path:
        """The folder of its weights."""
        return self.folder / WEIGHTS


def open_checkpoint(
    folder: Path,
    tensors: dict[str, list[Any]],
    group: ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Verify a checkpoint; all ranks call it, and each reads its share of the files.

    Args:
        tensors: of the model at hand, see ``tensor_record``.
        check: raises a ``LomoError`` where the record is not one to go on from.

    Raises:
        LomoError: it is missing, damaged, or of another model; ``PeerError`` on all ranks but the one that found out.
    """

    def opened() -> Checkpoint:
        files, settings, found = _described(folder)
        refuse_other_blocks(folder, found.record, torch.distributed.get_world_size(group))
        refuse_other_model(folder, found.record, tensors)
        if check is not None:
            check(folder, found.record)
        rank = torch.distributed.get_rank(group)
        verify(folder, share(files, rank, torch.distributed.get_world_size(group)))
        if rank == 0:
            warn_of_edits(folder, settings)
        return found

    return raise_on_all_ranks(opened, group)


def open_alone(folder: Path) -> Checkpoint:
    """Verify a checkpoint in one process, without the others that ``open_checkpoint`` needs.

    Raises:
        LomoError: it is missing or damaged.
    """
    files, settings, found = _described(folder)
    verify(folder, files)
    warn_of_edits(folder, settings)
    return found


def newest_alone(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run's folder, verified in one process; damaged ones are passed over, and logged.

    Raises:
        CheckpointError: none of them is whole.
    """
    for folder in newest_first(run):
        try:
            return open_alone(folder)
        except LomoError as error:
            logger.warning("checkpoint passed over: %s", error)
    raise CheckpointError(f"none of the checkpoints in {run} is whole, see above; give the folder of another run")


def _described(folder: Path) -> tuple[dict[str, Entry], dict[str, Entry], Checkpoint]:
    """The files of a checkpoint, all of them there; those of its model folder, which people edit; and its record.

    All but weights and random states are verified.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    files, settings = read_manifest(folder, editable=lambda name: name.startswith(f"{MODEL}/"))
    refuse_strangers(folder, files)
    verify(folder, {name: entry for name, entry in files.items() if not name.endswith(".safetensors")})
    return files, settings, Checkpoint(folder, read_record(folder, files))


def newest_whole(
    output_dir: Path,
    tensors: dict[str, list[Any]],
    group: ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that ``open_checkpoint`` finds nothing wrong with; the others are passed over, and logged.

    Returns:
        None if ``output_dir`` holds no checkpoint at all.

    Raises:
        CheckpointError: it holds some, and none is fit to go on from.
    """
    found = gather_objects(newest_first(output_dir), group)[0]  # as rank 0 sees a shared file system
    for folder in found:
        try:
            return open_checkpoint(folder, tensors, group, check)
        except LomoError as error:
            if torch.distributed.get_rank(group) == 0:
                logger.warning("checkpoint passed over: %s", error)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {output_dir} can be resumed from, see above; to start from the "
            "beginning, remove them or give another --output_dir"
        )
    return None


def restore(checkpoint: Checkpoint, snapshot: Snapshot, group: ProcessGroup) -> dict[str, Tensor]:
    """Fill the shards and buffers of ``snapshot``; all ranks call it.

    Returns:
        What this rank had for itself; empty if the checkpoint is of another number of ranks.
    """
    load_weights(snapshot.shards, snapshot.buffers, checkpoint.weights, group)
    if checkpoint.record["world_size"] != torch.distributed.get_world_size(group):
        return {}
    return raise_on_all_ranks(lambda: read_rank(checkpoint.folder, torch.distributed.get_rank(group)), group)
