"""File systems that are small enough to fill up."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a separate file system on ``folder``; skip the test without the rights to do so."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system to fill it up")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
