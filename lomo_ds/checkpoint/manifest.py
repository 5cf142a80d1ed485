"""The manifest of a folder: sizes and checksums of its files, checked before any of them is used."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lomo_ds.errors import DamagedError

MANIFEST = "lomo_ds_manifest.json"

Entry = dict[str, Any]  # "bytes" and "sha256" of one file

logger = logging.getLogger(__name__)


def compute_entries(folder: Path, files: Iterable[Path]) -> dict[str, Entry]:
    """Sync ``files`` to disk and return the size and checksum of each, keyed by its path in ``folder``."""
    entries = {}
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return entries


def write_manifest(folder: Path, files: dict[str, Entry]) -> None:
    """Write the manifest with a checksum of its own, and sync the folder's directory entries."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_dump(files))
        file.flush()
        os.fsync(file.fileno())
    for parent in {folder, *((folder / name).parent for name in files)}:
        sync_folder(parent)


def read_manifest(folder: Path, editable: Callable[[str], bool]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Read the manifest in ``folder`` and check that its fixed files exist with the right size.

    Args:
        editable: returns whether people may edit the file of this name; all other files are fixed.

    Returns:
        The entries of the fixed files, and the entries of the editable files.

    Raises:
        DamagedError: the manifest is missing or damaged, or a fixed file is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        files: dict[str, Entry] = json.loads(text)["files"]
        intact = text == _dump(files)
    except FileNotFoundError:
        raise DamagedError(
            f"{folder} is not whole: it holds no {MANIFEST}, which is written last and must be part of every copy"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path} is damaged: it is not what was written")
    fixed = {name: entry for name, entry in files.items() if not editable(name)}
    for name, entry in fixed.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing; {path} names it")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedError(f"{file} is damaged: it has {file.stat().st_size} bytes of {entry['bytes']}")
    return fixed, {name: entry for name, entry in files.items() if name not in fixed}


def verify_files(folder: Path, files: dict[str, Entry]) -> None:
    """Compare the checksums of ``files`` in ``folder`` with their manifest entries.

    Raises:
        DamagedError: a file differs or cannot be read.
    """
    for name, entry in files.items():
        file = folder / name
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
        if digest != entry["sha256"]:
            raise DamagedError(
                f"{file} is damaged: its checksum is not the one in {MANIFEST}; if it was changed on purpose, save the "
                "model again with transformers' save_pretrained to a new folder, which will have no manifest"
            )


def warn_about_edits(folder: Path, files: dict[str, Entry]) -> None:
    """Log a warning with the names of ``files`` that were changed or removed.

    Raises:
        DamagedError: a file cannot be read, or is no longer valid JSON.
    """
    names = []
    for name, entry in files.items():
        try:
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                names.append(name)
                if name.endswith(".json"):
                    json.loads(content)
        except FileNotFoundError:
            names.append(name)
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{folder / name} was changed and is no longer valid JSON: {error}") from None
    if names:
        logger.warning("changed in %s since lomo_ds wrote it, and used as it is now: %s", folder, ", ".join(names))


def files_for_rank(files: dict[str, Entry], rank: int, world_size: int) -> dict[str, Entry]:
    """Return the files that one rank verifies: each file goes to one rank, and bytes are balanced over the ranks."""
    loads = [0] * world_size
    assigned = {}
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == rank:
            assigned[name] = files[name]
    return assigned


def sync_folder(folder: Path) -> None:
    """Sync the directory ``folder``, so that created and renamed files survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(files: dict[str, Entry]) -> str:
    """Serialize the entries deterministically, so that any differing byte means damage."""
    body = json.dumps(files, sort_keys=True)
    content = {"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
