"""Classification of a path to resume from or to export: a checkpoint, a run folder, or something else."""

from pathlib import Path

from lomo_ds.checkpoint.folders import is_checkpoint, list_checkpoints
from lomo_ds.errors import CheckpointError

# file patterns that identify folders of other programs, and a description of the folder
FOREIGN = [
    ("trainer_state.json", "a checkpoint of Hugging Face's Trainer"),
    ("*mp_rank_*", "a checkpoint of DeepSpeed's own engine"),
    ("zero_pp_rank_*", "a checkpoint of DeepSpeed's own engine"),
    ("global_step*", "a checkpoint folder of DeepSpeed's own engine"),
    ("checkpoint-*/trainer_state.json", "an output folder of Hugging Face's Trainer"),
    ("adapter_config.json", "an adapter"),
]


def is_run_folder(folder: Path) -> bool:
    """Return True for a folder that contains checkpoints, and False for a checkpoint itself.

    Raises:
        CheckpointError: the folder is neither; the message says what it is and what to give instead.
    """
    if is_checkpoint(folder):
        return False
    if list_checkpoints(folder):
        return True
    raise CheckpointError(_describe(folder))


def _describe(folder: Path) -> str:
    parent = next((parent for parent in folder.resolve().parents if is_checkpoint(parent)), None)
    if parent is not None:
        return f"{folder} is a part of the checkpoint {parent}; give that folder"
    if not folder.exists():
        return f"there is no checkpoint {folder}"
    if not folder.is_dir():
        return f"a checkpoint is a folder, but {folder} is a file; give the folder of a checkpoint of lomo_ds"
    for pattern, kind in FOREIGN:
        if next(folder.glob(pattern), None) is not None:
            return f"{folder} is {kind}, but lomo_ds reads only its own checkpoints; give the folder of one of these"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a model folder, which holds no training state; give it to launch/train.py as "
            "--model_name_or_path, or give the folder of a checkpoint"
        )
    return f"{folder} holds no checkpoint of lomo_ds; give a folder checkpoint-<step>, or a run folder that holds some"
