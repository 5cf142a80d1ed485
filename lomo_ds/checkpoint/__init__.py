"""Checkpoints: the whole state of a run on disk, exact, atomic and verified, for any number of ranks to go on from."""

from lomo_ds.checkpoint.folders import (
    checkpoint_name,
    checkpoints_in,
    is_checkpoint,
    read_latest,
    remove,
    remove_unfinished,
    rotate,
    step_of,
)
from lomo_ds.checkpoint.load import Checkpoint, newest_alone, newest_whole, open_alone, open_checkpoint, restore
from lomo_ds.checkpoint.locate import is_run
from lomo_ds.checkpoint.save import Saver
from lomo_ds.checkpoint.state import MODEL, Snapshot, dtype_of, refuse_other_model, tensor_record
from lomo_ds.checkpoint.weights import whole_tensors

__all__ = [
    "MODEL",
    "Checkpoint",
    "Saver",
    "Snapshot",
    "checkpoint_name",
    "checkpoints_in",
    "dtype_of",
    "is_checkpoint",
    "is_run",
    "newest_alone",
    "newest_whole",
    "open_alone",
    "open_checkpoint",
    "read_latest",
    "refuse_other_model",
    "remove",
    "remove_unfinished",
    "restore",
    "rotate",
    "step_of",
    "tensor_record",
    "whole_tensors",
]
