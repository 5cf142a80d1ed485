"""Checks of a model folder's files: unchanged since the export, and not pointers of git-lfs."""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lomo_ds.checkpoint.manifest import MANIFEST, files_for_rank, read_manifest, verify_files, warn_about_edits
from lomo_ds.errors import ModelError

WEIGHTS = (".safetensors", ".safetensors.index.json")
POINTER = b"version https://git-lfs.github.com/spec/"  # start of a file that git-lfs has not fetched yet


def verify_export(folder: str, rank: int = 0, world_size: int = 1, weights: bool = True) -> None:
    """Compare a folder's files with the manifest that lomo_ds wrote there, if there is one.

    Weights must be unchanged. Settings and tokenizers may be edited, and rank 0 logs those that were.

    Args:
        weights: whether to verify this rank's part of the weight files; otherwise rank 0 checks the editable files.

    Raises:
        DamagedError: a weight file was changed, or another file is no longer valid JSON.
        ModelError: a file is a git-lfs pointer, see ``check_no_lfs_pointers``.
    """
    path = Path(folder)
    check_no_lfs_pointers(path)
    if not (path / MANIFEST).exists() and not _claims_manifest(path):
        return
    fixed, editable = read_manifest(path, editable=lambda name: not name.endswith(WEIGHTS))
    if weights:
        verify_files(path, files_for_rank(fixed, rank, world_size))
    elif rank == 0:
        warn_about_edits(path, editable)


def check_no_lfs_pointers(folder: Path) -> None:
    """Check that no file is a git-lfs pointer in place of the actual file.

    Raises:
        ModelError: a file is a pointer; the message names it.
    """
    for file in sorted(file for file in folder.glob("*") if file.is_file()):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise ModelError(f"{file} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")


def _claims_manifest(folder: Path) -> bool:
    """Return whether a weight file was exported with a manifest, which may be missing in a copy."""
    for file in folder.glob("model*.safetensors"):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            if "manifest" in (opened.metadata() or {}):
                return True
    return False
