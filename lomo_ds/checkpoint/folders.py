"""Names, order and rotation of the checkpoint folders in an output folder, and the ``latest`` file."""

import os
import re
import shutil
from pathlib import Path

from lomo_ds.checkpoint.manifest import MANIFEST, sync_folder
from lomo_ds.errors import CheckpointError

WEIGHTS = "weights"  # folder with the shards of all ranks; a save creates it first
RECORD = "state.json"
LATEST = "latest"  # file with the name of the newest checkpoint, as in DeepSpeed
# suffixes of folders that a killed process leaves behind: being written, being deleted, being replaced
UNFINISHED = (".partial", ".deleting", ".replaced")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint saved after ``step``."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name, or -1 if the name is not ``checkpoint-<step>``."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return all lomo_ds checkpoints, complete or not, in order of their steps."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) >= 0 and is_checkpoint(folder)]
    return sorted(folders, key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` is a lomo_ds checkpoint, possibly damaged; other programs use the same names."""
    markers = [(folder / WEIGHTS).is_dir(), (folder / RECORD).is_file(), (folder / MANIFEST).is_file()]
    return sum(markers) >= 2


def check_replaceable(folder: Path) -> None:
    """Check that a save to ``folder`` would delete only a checkpoint or the remains of an interrupted save.

    Raises:
        CheckpointError: ``folder`` holds something else.
    """
    partial = folder.with_name(folder.name + ".partial")
    for path, is_ours in ((folder, is_checkpoint(folder)), (partial, (partial / WEIGHTS).is_dir())):
        is_empty = path.is_dir() and not any(path.iterdir())
        if os.path.lexists(path) and not is_empty and not is_ours:
            raise CheckpointError(
                f"a checkpoint may only replace another checkpoint, but {path} is not one that lomo_ds wrote; "
                "give another tag or folder"
            )


def newest_first(output_dir: Path) -> list[Path]:
    """Return the checkpoints in the order to try them: the one that ``latest`` names, then by descending step."""
    checkpoints = list_checkpoints(output_dir)[::-1]
    latest = read_latest(output_dir)
    return sorted(checkpoints, key=lambda folder: folder.name != latest)


def read_latest(folder: Path) -> str | None:
    """Return the name of the newest checkpoint from ``latest``, or None if that file cannot be read."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def publish(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, replacing an older checkpoint of that name."""
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_latest(final: Path) -> None:
    """Write the name of the checkpoint ``final`` to ``latest``, atomically."""
    pointer = final.parent / (LATEST + ".partial")
    with pointer.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.replace(final.parent / LATEST)
    sync_folder(final.parent)


def rotate(output_dir: Path, limit: int, protected: set[str]) -> None:
    """Delete the checkpoints of the lowest steps until ``limit`` remain, but none whose name is ``protected``."""
    checkpoints = list_checkpoints(output_dir)
    surplus = max(len(checkpoints) - limit, 0)
    for folder in [folder for folder in checkpoints if folder.name not in protected][:surplus]:
        remove(folder)


def remove_unfinished(output_dir: Path) -> None:
    """Delete folders that a killed process left half written or half deleted.

    A checkpoint that was moved aside for a new one of the same name is restored if the new one was not put in place.
    """
    unfinished = [folder for folder in output_dir.glob("checkpoint-*.*") if folder.suffix in UNFINISHED]
    for folder in unfinished:
        original = folder.with_suffix("")
        if step_of(original) < 0:
            continue
        if folder.suffix == ".replaced" and not original.exists():
            folder.rename(original)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint, renaming it first so that no checkpoint with half its files is ever visible."""
    deleting = folder.with_name(folder.name + ".deleting")
    folder.rename(deleting)
    shutil.rmtree(deleting, ignore_errors=True)  # files that are still open are deleted at the next start
