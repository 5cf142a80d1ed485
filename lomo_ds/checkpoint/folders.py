"""Checkpoints side by side in one folder: their names and order, and which one is the latest."""

import os
import re
import shutil
from pathlib import Path

from lomo_ds.checkpoint.manifest import MANIFEST, sync_folder
from lomo_ds.errors import CheckpointError

WEIGHTS = "weights"  # folder of every rank's shards, the first that a save makes
RECORD = "state.json"
LATEST = "latest"  # the file that names the checkpoint written last, as DeepSpeed's does
# what a process that was killed leaves behind: in the making, being deleted, replaced
UNFINISHED = (".partial", ".deleting", ".replaced")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after ``step``."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 if it is none of ours."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """All checkpoints of lomo_ds, whole or not, the lowest step first."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) >= 0 and is_checkpoint(folder)]
    return sorted(folders, key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint of lomo_ds, damaged perhaps; other programs give theirs the same names."""
    signs = [(folder / WEIGHTS).is_dir(), (folder / RECORD).is_file(), (folder / MANIFEST).is_file()]
    return sum(signs) >= 2


def refuse_to_replace(folder: Path) -> None:
    """Check that a save to ``folder`` deletes nothing but a checkpoint, or what a save cut short has left.

    Raises:
        CheckpointError: something else is there.
    """
    partial = folder.with_name(folder.name + ".partial")
    for place, is_ours in ((folder, is_checkpoint(folder)), (partial, (partial / WEIGHTS).is_dir())):
        is_empty = place.is_dir() and not any(place.iterdir())
        if os.path.lexists(place) and not is_empty and not is_ours:
            raise CheckpointError(
                f"a checkpoint takes the place of a checkpoint alone, and {place} is none that lomo_ds has written; "
                "give another tag or folder"
            )


def newest_first(output_dir: Path) -> list[Path]:
    """The checkpoints in the order in which to try them: what ``latest`` names, then the highest step first."""
    found = checkpoints_in(output_dir)[::-1]
    latest = read_latest(output_dir)
    return sorted(found, key=lambda folder: folder.name != latest)


def read_latest(folder: Path) -> str | None:
    """The name of the checkpoint that was written last; None if no file says so."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of an older one of that name."""
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


def point_latest(final: Path) -> None:
    """Let ``latest`` name the checkpoint ``final``, at once or not at all."""
    pointer = final.parent / (LATEST + ".partial")
    with pointer.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.replace(final.parent / LATEST)
    sync_folder(final.parent)


def rotate(output_dir: Path, limit: int, protected: set[str]) -> None:
    """Delete the checkpoints of the lowest steps until ``limit`` are left, but none whose name is ``protected``."""
    found = checkpoints_in(output_dir)
    surplus = max(len(found) - limit, 0)
    for folder in [folder for folder in found if folder.name not in protected][:surplus]:
        remove(folder)


def remove_unfinished(output_dir: Path) -> None:
    """Delete what a process that was killed has left half written or half deleted.

    A checkpoint that was moved aside for one of the same name comes back, if the other has not taken its place.
    """
    found = [folder for folder in output_dir.glob("checkpoint-*.*") if folder.suffix in UNFINISHED]
    for folder in found:
        original = folder.with_suffix("")
        if step_of(original) < 0:
            continue
        if folder.suffix == ".replaced" and not original.exists():
            folder.rename(original)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; at no moment is there one with half its files."""
    deleting = folder.with_name(folder.name + ".deleting")
    folder.rename(deleting)
    shutil.rmtree(deleting, ignore_errors=True)  # a file that someone holds open goes with the next start
