"""A folder's files with their sizes and checksums, so that a damaged one is found before anything of it is used."""

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


def entries(folder: Path, files: Iterable[Path]) -> dict[str, Entry]:
    """Size and checksum of each of ``files``, by its path in ``folder``; what has been written is on the disk then."""
    found = {}
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def write_manifest(folder: Path, files: dict[str, Entry]) -> None:
    """Write the manifest, itself checksummed, and make the folder's names durable."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_dump(files))
        file.flush()
        os.fsync(file.fileno())
    for below in {folder, *((folder / name).parent for name in files)}:
        sync_folder(below)


def read_manifest(folder: Path, editable: Callable[[str], bool]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The entries of the manifest in ``folder``.

    Args:
        editable: whether people edit the file of this name.

    Returns:
        The entries of the files that nobody edits, each of which exists and has the size that it names; the others'.

    Raises:
        DamagedError: the manifest is missing or damaged, or a file that nobody edits is missing or of another size.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        files: dict[str, Entry] = json.loads(text)["files"]
        whole = text == _dump(files)
    except FileNotFoundError:
        raise DamagedError(
            f"{folder} is not whole: it holds no {MANIFEST}, which is written last and belongs into every copy"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is damaged: it is not what was written")
    fixed = {name: entry for name, entry in files.items() if not editable(name)}
    for name, entry in fixed.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing; {path} names it")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedError(f"{file} is damaged: it has {file.stat().st_size} bytes of {entry['bytes']}")
    return fixed, {name: entry for name, entry in files.items() if name not in fixed}


def verify(folder: Path, files: dict[str, Entry]) -> None:
    """Read ``files`` of ``folder`` and compare their checksums.

    Raises:
        DamagedError: one differs or cannot be read.
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
                "model anew with transformers' save_pretrained, which leaves the manifest behind"
            )


def warn_of_edits(folder: Path, files: dict[str, Entry]) -> None:
    """Log the names of those of ``files`` that a person has changed or removed.

    Raises:
        DamagedError: one cannot be read, or is no JSON any more.
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
            raise DamagedError(f"{folder / name} was changed and is no JSON any more: {error}") from None
    if names:
        logger.warning("changed in %s since lomo_ds wrote it, and used as it is now: %s", folder, ", ".join(names))


def share(files: dict[str, Entry], rank: int, world_size: int) -> dict[str, Entry]:
    """What one rank verifies, so that all ranks together verify every file once, each about as many bytes."""
    loads = [0] * world_size
    mine = {}
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == rank:
            mine[name] = files[name]
    return mine


def sync_folder(folder: Path) -> None:
    """Make names that were created or renamed in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(files: dict[str, Entry]) -> str:
    """One way to write the entries, so that any other byte is damage."""
    body = json.dumps(files, sort_keys=True)
    content = {"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
