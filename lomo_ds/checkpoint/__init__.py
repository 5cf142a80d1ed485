"""Checkpoints: the full state of a run, saved atomically, verified on load, and resumable on any number of ranks."""

from lomo_ds.checkpoint.folders import (
    checkpoint_name,
    is_checkpoint,
    list_checkpoints,
    read_latest,
    remove,
    remove_unfinished,
    rotate,
    step_of,
)
from lomo_ds.checkpoint.load import (
    Checkpoint,
    open_checkpoint,
    open_in_one_process,
    open_newest,
    open_newest_in_one_process,
    restore,
)
from lomo_ds.checkpoint.locate import is_run_folder
from lomo_ds.checkpoint.save import Saver
from lomo_ds.checkpoint.state import MODEL, Snapshot, check_same_model, describe_tensors, parse_dtype
from lomo_ds.checkpoint.weights import load_full_tensors

__all__ = [
    "MODEL",
    "Checkpoint",
    "Saver",
    "Snapshot",
    "check_same_model",
    "checkpoint_name",
    "describe_tensors",
    "is_checkpoint",
    "is_run_folder",
    "list_checkpoints",
    "load_full_tensors",
    "open_checkpoint",
    "open_in_one_process",
    "open_newest",
    "open_newest_in_one_process",
    "parse_dtype",
    "read_latest",
    "remove",
    "remove_unfinished",
    "restore",
    "rotate",
    "step_of",
]
