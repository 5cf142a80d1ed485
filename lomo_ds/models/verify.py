"""Files of a model folder that are not what they should be: changed since an export, or never fetched."""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lomo_ds.checkpoint.manifest import MANIFEST, files_for_rank, read_manifest, verify_files, warn_about_edits
from lomo_ds.errors import ModelError

WEIGHTS = (".safetensors", ".safetensors.index.json")
POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git-lfs has not fetched yet


def verify_export(folder: str, rank: int = 0, world_size: int = 1, weights: bool = True) -> None:
    """Compare a folder's files with the manifest that lomo_ds wrote there, if it did.

    Weights must be what was written. Settings and tokenizers, which people edit, may differ, and rank 0 names them.

    Args:
        weights: which files: this rank's share of the weights, or all the others, which are small.

    Raises:
        DamagedError: a weight file is not what was written, or another is no JSON any more.
        ModelError: a file is none, see ``check_no_lfs_pointers``.
    """
    path = Path(folder)
    check_no_lfs_pointers(path)
    if not (path / MANIFEST).exists() and not _claims_manifest(path):
        return
    wanted, others = read_manifest(path, editable=lambda name: not name.endswith(WEIGHTS))
    if weights:
        verify_files(path, files_for_rank(wanted, rank, world_size))
    elif rank == 0:
        warn_about_edits(path, others)


def check_no_lfs_pointers(folder: Path) -> None:
    """Check that no file is what git leaves in place of one that git-lfs keeps.

    Raises:
        ModelError: one is; it is named.
    """
    for file in sorted(file for file in folder.glob("*") if file.is_file()):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise ModelError(f"{file} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")


def _claims_manifest(folder: Path) -> bool:
    """Whether a weight file says that it was exported with a manifest, which a copy may lack."""
    for file in folder.glob("model*.safetensors"):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            if "manifest" in (opened.metadata() or {}):
                return True
    return False
