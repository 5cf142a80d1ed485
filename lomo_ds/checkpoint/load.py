"""Loading of checkpoints: verify the files on all ranks, then let each rank read its own part."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.checkpoint.folders import WEIGHTS, newest_first
from lomo_ds.checkpoint.manifest import Entry, files_for_rank, read_manifest, verify_files, warn_about_edits
from lomo_ds.checkpoint.state import (
    MODEL,
    Snapshot,
    check_no_extra_files,
    check_same_blocks,
    check_same_model,
    check_same_rule_state,
    load_rank_state,
    read_record,
)
from lomo_ds.checkpoint.weights import load_weights
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.errors import CheckpointError, LomoError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: every file has the bytes that were written, except settings that people may edit."""

    folder: Path
    record: dict[str, Any]

    @property
    def weights(self) -> Path:
        """Folder of the weights."""
        return self.folder / WEIGHTS


def open_checkpoint(
    folder: Path,
    tensors: dict[str, list[Any]],
    group: ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Verify a checkpoint. All ranks must call this, and each rank reads a part of the files.

    Args:
        tensors: shapes and dtypes of the current model, see ``describe_tensors``.
        check: raises a ``LomoError`` if training cannot resume from the record.

    Raises:
        LomoError: the checkpoint is missing, damaged, or of another model; the other ranks raise ``PeerError``.
    """

    def open_and_verify() -> Checkpoint:
        files, settings, checkpoint = _read_metadata(folder)
        check_same_blocks(folder, checkpoint.record, torch.distributed.get_world_size(group))
        check_same_model(folder, checkpoint.record, tensors)
        if check is not None:
            check(folder, checkpoint.record)
        rank = torch.distributed.get_rank(group)
        verify_files(folder, files_for_rank(files, rank, torch.distributed.get_world_size(group)))
        if rank == 0:
            warn_about_edits(folder, settings)
        return checkpoint

    return raise_on_all_ranks(open_and_verify, group)


def open_in_one_process(folder: Path) -> Checkpoint:
    """Verify a checkpoint in a single process, without a process group.

    Raises:
        LomoError: the checkpoint is missing or damaged.
    """
    files, settings, checkpoint = _read_metadata(folder)
    verify_files(folder, files)
    warn_about_edits(folder, settings)
    return checkpoint


def open_newest_in_one_process(run: Path) -> Checkpoint:
    """Open the newest intact checkpoint of a run folder in a single process; log and skip damaged ones.

    Raises:
        CheckpointError: no checkpoint is intact.
    """
    for folder in newest_first(run):
        try:
            return open_in_one_process(folder)
        except LomoError as error:
            logger.warning("checkpoint passed over: %s", error)
    raise CheckpointError(f"none of the checkpoints in {run} is whole, see above; give the folder of another run")


def _read_metadata(folder: Path) -> tuple[dict[str, Entry], dict[str, Entry], Checkpoint]:
    """Return the fixed files of a checkpoint, the editable files of its model folder, and the checkpoint.

    All fixed files exist. All of them except the weights and random states have been verified.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    files, settings = read_manifest(folder, editable=lambda name: name.startswith(f"{MODEL}/"))
    check_no_extra_files(folder, files)
    verify_files(folder, {name: entry for name, entry in files.items() if not name.endswith(".safetensors")})
    return files, settings, Checkpoint(folder, read_record(folder, files))


def open_newest(
    output_dir: Path,
    tensors: dict[str, list[Any]],
    group: ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Checkpoint | None:
    """Open the newest checkpoint that ``open_checkpoint`` accepts; log and skip the others.

    Returns:
        None if ``output_dir`` holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but training can resume from none of them.
    """
    folders = gather_objects(newest_first(output_dir), group)[0]  # rank 0's view of the shared file system
    for folder in folders:
        try:
            return open_checkpoint(folder, tensors, group, check)
        except LomoError as error:
            if torch.distributed.get_rank(group) == 0:
                logger.warning("checkpoint passed over: %s", error)
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints in {output_dir} can be resumed from, see above; to start from the "
            "beginning, remove them or give another --output_dir"
        )
    return None


def restore(
    checkpoint: Checkpoint, snapshot: Snapshot, group: ProcessGroup, rule_state: bool = True
) -> dict[str, Tensor]:
    """Load a checkpoint into the shards and buffers of ``snapshot``. All ranks must call this.

    Args:
        rule_state: whether to load the update rules' state too: slices are cut anew if the number of ranks differs.

    Returns:
        This rank's ``Snapshot.rank_state``; empty if the checkpoint was saved with another world size.

    Raises:
        CheckpointError: the checkpoint holds the state of other rules.
    """
    shards, whole = snapshot.shards, snapshot.buffers
    if rule_state:
        world_size = torch.distributed.get_world_size(group)
        check_same_blocks(checkpoint.folder, checkpoint.record, world_size, "rule_state")
        check_same_rule_state(checkpoint.folder, checkpoint.record, snapshot.rule_state)
        shards, whole = shards + snapshot.state_shards, whole | snapshot.replicated_state
    load_weights(shards, whole, checkpoint.weights, group)
    if checkpoint.record["world_size"] != torch.distributed.get_world_size(group):
        return {}
    return raise_on_all_ranks(lambda: load_rank_state(checkpoint.folder, torch.distributed.get_rank(group)), group)
