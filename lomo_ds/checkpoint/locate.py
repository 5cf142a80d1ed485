"""What a path that is to be resumed from, or exported, stands for: a checkpoint, a run's folder, or a mistake."""

from pathlib import Path

from lomo_ds.checkpoint.folders import checkpoints_in, is_checkpoint
from lomo_ds.errors import CheckpointError

# of a folder, a pattern that tells what wrote it, and what that is
FOREIGN = [
    ("trainer_state.json", "a checkpoint of Hugging Face's Trainer"),
    ("*mp_rank_*", "a checkpoint of DeepSpeed's own engine"),
    ("zero_pp_rank_*", "a checkpoint of DeepSpeed's own engine"),
    ("global_step*", "a checkpoint folder of DeepSpeed's own engine"),
    ("checkpoint-*/trainer_state.json", "an output folder of Hugging Face's Trainer"),
    ("adapter_config.json", "an adapter"),
]


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is not itself a checkpoint, and holds some.

    Raises:
        CheckpointError: it is neither; the message says what it is, and what to give.
    """
    if is_checkpoint(folder):
        return False
    if checkpoints_in(folder):
        return True
    raise CheckpointError(_describe(folder))


def _describe(folder: Path) -> str:
    inside = next((above for above in folder.resolve().parents if is_checkpoint(above)), None)
    if inside is not None:
        return f"{folder} is a part of the checkpoint {inside}; give that folder"
    if not folder.exists():
        return f"there is no checkpoint {folder}"
    if not folder.is_dir():
        return f"a checkpoint is a folder, and {folder} is a file; give the folder of a checkpoint of lomo_ds"
    for pattern, kind in FOREIGN:
        if next(folder.glob(pattern), None) is not None:
            return f"{folder} is {kind}, and lomo_ds reads its own checkpoints alone; give the folder of one of these"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a model folder, which holds no state of training; give it to launch/train.py as "
            "--model_name_or_path, or give the folder of a checkpoint"
        )
    return f"{folder} holds no checkpoint of lomo_ds; give a folder checkpoint-<step>, or the run's that holds some"
