"""A model folder that lomo_ds exported, compared with the manifest it was exported with."""

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lomo_ds.manifest import MANIFEST, read_manifest, share, verify


def verify_export(folder: str, rank: int = 0, world_size: int = 1, weights: bool = True) -> None:
    """Compare this rank's share of a folder's files with the manifest that lomo_ds wrote there, if it did.

    Args:
        weights: which files: the weights, or all the others, which are small.

    Raises:
        DamagedError: one of them is not what was written.
    """
    if (Path(folder) / MANIFEST).exists() or _claims_manifest(Path(folder)):
        files = read_manifest(Path(folder))
        wanted = {name: entry for name, entry in files.items() if name.endswith(".safetensors") == weights}
        verify(Path(folder), share(wanted, rank, world_size))


def _claims_manifest(folder: Path) -> bool:
    """Whether a weight file says that it was exported with a manifest, which a copy may lack."""
    for file in folder.glob("model*.safetensors"):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            if "manifest" in (opened.metadata() or {}):
                return True
    return False
