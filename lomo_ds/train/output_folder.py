"""Rules for the output folder of a run or an export: inputs and the results of other runs are never overwritten.

| output folder | ``launch/train.py`` | ``launch/export.py`` |
|---|---|---|
| is an input folder, is inside one, or contains one | refused | refused |
| does not exist, or is empty | accepted | accepted |
| contains a model, checkpoint or record that lomo_ds has not written | refused | refused |
| contains the model of another run | needs ``--overwrite_output_dir`` | refused |
| contains checkpoints of another run | needs ``--overwrite_output_dir``, which deletes them at start | refused |
| is in use by another job | refused | refused |
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lomo_ds.checkpoint import is_checkpoint, list_checkpoints, step_of
from lomo_ds.checkpoint.manifest import MANIFEST
from lomo_ds.config.arguments import HEADER, TrainArguments
from lomo_ds.errors import CheckpointError, ConfigError
from lomo_ds.models import SAVING
from lomo_ds.train.progress import FINISHED

RECORDS = (
    "config.yaml",
    "ds_config.json",
    "metrics.jsonl",
)  # every run writes these; others use these names too
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")


def check_input_overlap(output_dir: Path, input_folders: Iterable[str | Path]) -> None:
    """Check that ``output_dir`` is not an input folder, inside one, or a parent of one; symbolic links are followed.

    Args:
        input_folders: the folders that are read.

    Raises:
        ConfigError: the folders overlap; the message names both and suggests another folder.
    """
    for folder in map(Path, input_folders):
        relation = _relation(output_dir.resolve(), _enclosing_folder(folder.resolve()))
        if folder.is_dir() and relation is not None:
            raise ConfigError(
                f"--output_dir {output_dir} {relation} the input folder {folder}, where nothing may be written; "
                f"give a separate folder, for example {_unused_sibling(folder)}"
            )


def check_foreign_files(output_dir: Path) -> None:
    """Check that a run in ``output_dir`` overwrites nothing that lomo_ds has not written.

    Raises:
        ConfigError: it would; the message names the file or folder.
    """
    is_run_output = _is_run_output(output_dir)
    foreign = [] if (output_dir / MANIFEST).exists() else [f for name in MODEL_FILES for f in output_dir.glob(name)]
    foreign += [output_dir / name for name in RECORDS if not is_run_output and (output_dir / name).exists()]
    foreign += [
        folder for folder in output_dir.glob("checkpoint-*")
        if step_of(folder) >= 0 and not is_checkpoint(folder) and any(folder.iterdir())
    ]  # fmt: skip
    if foreign:
        raise ConfigError(
            f"--output_dir {output_dir} contains {foreign[0].name}, which lomo_ds has not written and a run would "
            f"overwrite; give another folder, for example {_unused_sibling(output_dir)}"
        )


def check_input_files(arguments: TrainArguments) -> None:
    """Check that no input text is one of the files that the run writes.

    Raises:
        ConfigError: the run would overwrite an input text.
    """
    written = {(Path(arguments.output_dir) / name).resolve() for name in (*RECORDS, FINISHED)}
    for name in ("train_file", "validation_file"):
        for file in getattr(arguments, name) or []:
            if Path(file).resolve() in written:
                raise ConfigError(
                    f"--{name} {file} would be overwritten by this run, because it is in --output_dir; give another "
                    "--output_dir"
                )


def check_other_run(arguments: TrainArguments, resumed: Path | None, other_checkpoints: list[Path]) -> None:
    """Check that ``output_dir`` contains no results of another run, unless --overwrite_output_dir is set.

    Args:
        resumed: the checkpoint that the run resumes from.
        other_checkpoints: see ``checkpoints_of_other_run``.

    Raises:
        ConfigError: it contains a checkpoint or the model of another run.
    """
    output_dir = Path(arguments.output_dir)
    if arguments.overwrite_output_dir:
        return
    if other_checkpoints:
        raise ConfigError(
            f"--output_dir {output_dir} contains {other_checkpoints[-1].name} of another run; resume from it "
            "with --resume_from_checkpoint auto, give another --output_dir, or replace it with --overwrite_output_dir"
        )
    in_place = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    if not in_place and ((output_dir / MANIFEST).exists() or (output_dir / FINISHED).exists()):
        raise ConfigError(
            f"--output_dir {output_dir} contains the model of another run; give another folder, for example "
            f"{_unused_sibling(output_dir)}, or let this run replace it with --overwrite_output_dir"
        )


def checkpoints_of_other_run(output_dir: Path, resumed: Path | None) -> list[Path]:
    """Return the checkpoints that ``auto`` would later mistake for this run's: all after ``resumed``."""
    in_place = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    last_step = step_of(resumed) if resumed is not None and in_place else -1
    return [folder for folder in list_checkpoints(output_dir) if step_of(folder) > last_step]


def check_empty_folder(folder: Path) -> None:
    """Check that ``folder`` is new or empty, apart from the leftovers of an interrupted export.

    Raises:
        CheckpointError: it is a file, or contains something else.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"--output_dir {folder} is a file; give a new folder, for example {_unused_sibling(folder)}"
        )
    contents = [file.name for file in sorted(folder.iterdir()) if file.name != SAVING] if folder.is_dir() else []
    if contents:
        raise CheckpointError(
            f"--output_dir {folder} contains {contents[0]}, but an export needs a new or empty folder; give another, "
            f"for example {_unused_sibling(folder)}"
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other jobs while the context is open; the lock of a killed job is released.

    The lock is on the folder itself, so no lock file is left behind. It has no effect on a file system that does not
    lock folders, or does not lock them across hosts (NFS, some parallel file systems).

    Raises:
        ConfigError: another job holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # raised by file systems that do not lock folders
            _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"--output_dir {folder} is in use by another job; wait for it to end, or give another folder"
        ) from None


def _relation(folder: Path, input_folder: Path) -> str | None:
    """Return how ``folder`` overlaps ``input_folder``, both resolved, as a verb; None if it does not."""
    if folder == input_folder:
        return "is"
    if input_folder in folder.parents:
        return "is inside"
    return "contains" if folder in input_folder.parents else None


def _enclosing_folder(folder: Path) -> Path:
    """Return the folder that must stay intact with ``folder``: for a snapshot in the hub's cache, that of its model."""
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def _unused_sibling(folder: Path) -> Path:
    """Return the path of a new folder beside ``folder``, with a number appended to its name."""
    enclosing = _enclosing_folder(folder.resolve())
    number = next(
        number for number in range(2, 10**6) if not enclosing.with_name(f"{enclosing.name}-{number}").exists()
    )
    return enclosing.with_name(f"{enclosing.name}-{number}")


def _is_run_output(folder: Path) -> bool:
    """Return whether a run of lomo_ds has written the records in ``folder``."""
    try:
        with (folder / "config.yaml").open(encoding="utf-8") as file:
            if file.readline().rstrip("\n") == HEADER:
                return True
    except (OSError, UnicodeDecodeError):
        pass
    return (folder / FINISHED).exists() or bool(list_checkpoints(folder))
